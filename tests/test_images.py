"""The container files: linted, their steps rehearsed, and the examples of running them that the documentation gives."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from appliance.config import load_config
from scripts.rehearsal import ContainerFile, Rehearsal, context, ignored, parse

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "Dockerfile.cpu", ROOT / "Dockerfile.cuda"]
PAGE = (ROOT / "appliance" / "docs" / "operations.md").read_text("utf-8")


def read(path: Path) -> ContainerFile:
    return parse(path.read_text("utf-8"))


def example(language: str, containing: str) -> str:
    """A block of code of the page on operations."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if containing in block]
    return str(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_container_file_has_no_fault_that_hadolint_knows(path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint has no wheel for this platform")
    done = subprocess.run([hadolint, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_image_is_built_in_stages_runs_as_nobody_special_and_says_how_it_is(path: Path) -> None:
    file = read(path)
    assert len(file.stages) == 2
    final = file.stages[-1]
    words = [step.word for step in final.steps]
    assert words.index("USER") < words.index("ENTRYPOINT"), "the program does not run as root"
    user = file.last("USER")
    assert user is not None and user.isdigit() and int(user) > 0
    assert file.last("VOLUME") == "/data"
    check = json.loads((file.last("HEALTHCHECK") or "").partition("CMD ")[2])
    assert "/healthz" in check[-1] and "8080" in check[-1]
    assert "8080" in json.loads(file.last("CMD") or "[]") and file.last("EXPOSE") == "8080"
    assert json.loads(file.last("ENTRYPOINT") or "[]")[0] == "tini", "orphans are reaped"
    # Nothing that only building needs: no sources, no caches, no build arguments with an index in them.
    assert all("--from=" in step.rest for step in final.steps if step.word == "COPY")
    assert not any(step.word == "ARG" and "INDEX" in step.rest for step in final.steps)


def test_the_cuda_image_has_vllm_in_an_environment_of_its_own_from_pins_with_hashes() -> None:
    build = " ".join(step.rest for step in read(FILES[1]).stages[0].steps if step.word == "RUN")
    assert re.search(r"pip sync .*--require-hashes --python /opt/vllm scripts/requirements/gpu\.txt", build)
    environment = " ".join(step.rest for step in read(FILES[1]).stages[-1].steps if step.word == "ENV")
    path = re.search(r"PATH=(\S+)", environment)
    assert path is not None and path[1].index("/opt/appliance/.venv/bin") < path[1].index("/opt/vllm/bin")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_image_builds_the_kernels_once_the_program_is_there(path: Path) -> None:
    steps = read(path).stages[0].steps
    copied = [index for index, step in enumerate(steps) if step.word == "COPY" and step.rest.startswith("appliance ")]
    built = [index for index, step in enumerate(steps) if "appliance.llamacpp.kernels" in step.rest]
    assert copied < built


def test_a_build_is_given_what_it_copies_and_not_the_rest() -> None:
    given = context(ROOT)
    assert {"scripts/setup", "scripts/requirements/default.txt", "appliance/cli/__init__.py"} <= set(given)
    assert any(path.startswith("model_configs/") for path in given)
    assert any(path.startswith("appliance/llamacpp/kernels/") and path.endswith(".cpp") for path in given)
    assert not [path for path in given if path.startswith(("tests/", ".git", "README"))]


@pytest.mark.parametrize(
    ("path", "rules", "out"),
    [
        ("a/b.py", ["*"], True),
        ("a/b.py", ["*", "!a"], False),
        ("a/b.py", ["*", "!a/c.py"], True),
        ("a/__pycache__/x.pyc", ["*", "!a", "**/__pycache__"], True),
        ("scripts/setup", ["*", "!scripts/setup"], False),
        ("scripts/check", ["*", "!scripts/setup"], True),
    ],
)
def test_dockerignore_is_read_as_docker_reads_it(path: str, rules: list[str], out: bool) -> None:
    assert ignored(path, rules) is out


def test_lines_are_joined_comments_left_out_and_unknown_instructions_refused() -> None:
    file = parse("ARG A=1\n# c\nFROM x AS build\nRUN a \\\n # c\n && b\nFROM y\nCOPY --from=build /opt /opt\n")
    assert file.arguments == {"A": "1"}
    assert [stage.name for stage in file.stages] == ["build", "1"]
    assert file.stages[0].steps[0].rest.split() == ["a", "&&", "b"]
    with pytest.raises(ValueError, match="ONBUILD"):
        parse("FROM x\nONBUILD RUN y\n")


def test_the_steps_of_a_small_file_are_taken_below_the_scratch_root(tmp_path: Path) -> None:
    text = (
        "FROM base AS build\nARG WHO=nobody\nWORKDIR /opt/it\nCOPY hardware hardware\n"
        "RUN apt-get update && echo ${WHO} >/opt/it/who && ls hardware >/tmp/listed\n"
        "FROM base\nCOPY --from=build /opt/it /opt/it\nENV HERE=/opt/it PATH=/opt/it/bin:$PATH\n"
        'WORKDIR /data\nRUN cat "$HERE/who" >/data/seen\n'
    )
    rehearsal = Rehearsal(parse(text), tmp_path / "root", {"WHO": "somebody"})
    rehearsal.run()
    root = tmp_path / "root"
    assert (root / "data/seen").read_text() == "somebody\n" and (root / "opt/it/hardware/gpu-h200.toml").exists()
    assert not (root / "tmp/listed").exists(), "the last stage has what it copied, and nothing else"
    assert rehearsal.environment["HERE"] == f"{root}/opt/it"
    assert rehearsal.environment["PATH"].startswith(f"{root}/opt/it/bin:")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_cpu_images_steps_make_a_node_that_is_healthy_with_its_program_read_only(tmp_path: Path) -> None:
    arguments = ["Dockerfile.cpu", "--arg", "LLAMA_FLAGS=", "--own-wheels", "--root", str(tmp_path / "root")]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.rehearsal", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0 and "healthy after" in done.stderr, done.stderr[-3000:]


# --- examples


def compose() -> dict[str, Any]:
    found = yaml.safe_load(example("yaml", "services:"))
    assert isinstance(found, dict)
    return found


def test_the_compose_file_starts_a_node_that_can_write_its_data_alone() -> None:
    file = compose()
    assert set(file) <= {"services", "volumes", "name"}
    for service in file["services"].values():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"] and "/tmp" in service["tmpfs"]
        assert (ROOT / service["build"]["dockerfile"]).exists()
        named = [mount.partition(":")[0] for mount in service["volumes"] if not mount.startswith((".", "/"))]
        assert named and set(named) <= set(file["volumes"]), "every named volume is declared"
        assert any(mount.split(":")[1] == "/data" for mount in service["volumes"])
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    gpu = file["services"]["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert gpu == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
    assert file["services"]["gpu"]["ipc"] == "host"


def unit() -> str:
    return example("ini", "[Service]")


def test_the_systemd_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze here")
    path = tmp_path / "appliance.service"
    # It looks for the program, too: one that is here stands for it.
    path.write_text(re.sub(r"/opt/appliance/\S+", "/bin/true", unit()))
    done = subprocess.run([analyze, "verify", "--man=no", path], capture_output=True, text=True, check=False)
    told = [line for line in done.stderr.splitlines() if "appliance.service" in line]
    assert done.returncode == 0 and not told, done.stderr


def test_the_units_limits_fit_the_node() -> None:
    text = unit()
    limit = re.search(r"LimitNOFILE=(\d+)", text)
    connections = load_config(None).server.max_connections
    assert limit is not None and int(limit[1]) >= 2 * connections + 256
    stop = re.search(r"TimeoutStopSec=(\d+)", text)
    assert stop is not None and int(stop[1]) > load_config(None).server.drain_seconds + 10
    assert "doctor" in text and "KillMode=mixed" in text
