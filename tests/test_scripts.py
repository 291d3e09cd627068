"""The scripts around the program: well formed, pinned, and set-up does each thing once."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scripts.index_settings import uv_settings

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    *(ROOT / "scripts" / name for name in ("setup", "serve", "test", "check", "fix", "pin")),
    ROOT / ".ci" / "run",
]
PINS = sorted((ROOT / "scripts" / "requirements").glob("*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def pinned(name: str) -> dict[str, list[Requirement]]:
    """The requirements of one pin file by package; several where markers tell them apart."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "scripts" / "requirements" / f"{name}.txt").read_text("utf-8").splitlines():
        if re.match(r"[a-z0-9]", line):
            requirement = Requirement(line.rstrip(" \\"))
            found.setdefault(requirement.name, []).append(requirement)
    return found


def versions(requirements: list[Requirement]) -> list[str]:
    return [next(iter(requirement.specifier)).version for requirement in requirements]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_may_be_run_and_has_no_fault_that_shellcheck_knows(script: Path) -> None:
    assert os.access(script, os.X_OK)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("pins", PINS, ids=lambda path: path.name)
def test_pins_name_no_address_and_every_one_has_hashes(pins: Path) -> None:
    text = pins.read_text("utf-8")
    assert "://" not in text
    assert not re.search(r"^(-|--)", text, re.MULTILINE), "an option that would say where to look"
    requirements = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert requirements
    for requirement in requirements:
        assert "==" in requirement.splitlines()[0]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", requirement), requirement.splitlines()[0]


def test_the_pins_hold_everything_that_the_project_asks_for_in_versions_that_it_allows() -> None:
    default = {**pinned("default"), **pinned("engine")}
    dev = {**pinned("dev"), **pinned("engine")}
    gpu = PROJECT["project"]["optional-dependencies"]["gpu"]
    wanted = [(name, default) for name in PROJECT["project"]["dependencies"]]
    wanted += [(name, dev) for name in PROJECT["dependency-groups"]["dev"]]
    wanted += [(name, pinned("gpu")) for name in gpu]
    for text, pins in wanted:
        requirement = Requirement(text)
        assert requirement.name in pins, f"{text} is not pinned; run scripts/pin"
        for version in versions(pins[requirement.name]):
            assert requirement.specifier.contains(version), f"{text} is pinned to {version}; run scripts/pin"


def test_development_differs_from_serving_only_by_more_packages() -> None:
    dev = pinned("dev")
    for name, requirements in pinned("default").items():
        assert versions(dev[name]) == versions(requirements), name


# ---- pip's settings for uv ----


@pytest.mark.parametrize(
    ("config", "environment", "expected"),
    [
        ("", {}, {}),
        ("global.index-url='https://mirror/simple'", {}, {"UV_DEFAULT_INDEX": "https://mirror/simple"}),
        ("global.index-url='https://mirror/simple'", {"UV_DEFAULT_INDEX": "x"}, {}),
        ("global.index-url='https://mirror/simple'", {"UV_INDEX_URL": "x"}, {}),
        ("global.index-url='a'\n:env:.index-url='b'", {}, {"UV_DEFAULT_INDEX": "b"}),
        ("install.find-links='/usr\\n/not/there\\n/tmp'", {}, {"UV_FIND_LINKS": "/usr,/tmp"}),
        ("install.find-links='/not/there'\nglobal.extra-index-url='file:///not/there'", {}, {}),
        (
            "global.extra-index-url='\\nhttps://a\\nhttps://b'",
            {},
            {"UV_INDEX": "https://a https://b", "UV_INDEX_STRATEGY": "unsafe-best-match"},
        ),
        (
            "global.cert='/ca.pem'\nglobal.proxy='http://proxy:1'\nglobal.trusted-host='h'\nglobal.timeout='7'",
            {},
            {
                "SSL_CERT_FILE": "/ca.pem",
                "ALL_PROXY": "http://proxy:1",
                "UV_INSECURE_HOST": "h",
                "UV_HTTP_TIMEOUT": "7",
            },
        ),
        ("global.disable-pip-version-check='1'\nnonsense", {}, {}),
    ],
)
def test_an_operators_settings_for_pip_hold_for_uv(
    config: str, environment: dict[str, str], expected: dict[str, str]
) -> None:
    assert uv_settings(config, environment) == expected


# ---- set-up, with stand-ins for uv and for the Python of the environments it makes ----

STAND_IN_UV = """#!/usr/bin/env bash
echo "uv $*" >>"$CALLS"
if [ "$1" = venv ]; then
  mkdir -p "${@: -1}/bin"
  cp "$STAND_IN_PYTHON" "${@: -1}/bin/python"
fi
if [ "$2" = sync ] && [ -n "${NO_NETWORK:-}" ]; then echo "no network" >&2; exit 1; fi
"""
STAND_IN_PYTHON = """#!/usr/bin/env bash
case "$*" in
  *"pip wheel"*)
    echo "build $CMAKE_ARGS" >>"$CALLS"
    if [ -n "${NO_COMPILER:-}" ]; then echo "cc1plus: error: it is broken"; exit 1; fi
    while [ "$1" != --wheel-dir ]; do shift; done
    mkdir -p "$2" && echo built >"$2/llama_cpp_python-0.3.36-py3-none-any.whl" ;;
  *kernels*)
    echo "kernels" >>"$CALLS"
    if [ -n "${NO_COMPILER:-}" ]; then echo "kernels: there is no C++ compiler" >&2; exit 1; fi ;;
  *purelib*) mkdir -p "$SITE" && echo "$SITE" ;;
  *llama_backend_init*) if [ -n "${ILLEGAL_INSTRUCTION:-}" ]; then echo "illegal instruction" >&2; exit 132; fi ;;
esac
"""


@dataclass(frozen=True)
class Checkout:
    """A copy of the scripts in a path with a space, where nothing real is installed."""

    root: Path
    environment: dict[str, str]

    def setup(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        self.calls_file.write_text("")
        return subprocess.run(
            [self.root / "scripts" / "setup", *arguments],
            cwd="/",
            env={**self.environment, **more},
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    @property
    def calls_file(self) -> Path:
        return Path(self.environment["CALLS"])

    def calls(self) -> str:
        return self.calls_file.read_text()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    root = tmp_path / "a clone"
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    stand_ins = {root / ".tools" / "uv" / "bin" / "uv": STAND_IN_UV, tmp_path / "python": STAND_IN_PYTHON}
    for path, text in stand_ins.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path / "home"),
        "CI": "true",
        "PYTHON": sys.executable,
        "CALLS": str(tmp_path / "calls"),
        "SITE": str(root / "site"),
        "STAND_IN_PYTHON": str(tmp_path / "python"),
    }
    return Checkout(root, environment)


def test_set_up_builds_and_installs_once_and_then_does_nothing(checkout: Checkout) -> None:
    first = checkout.setup()
    assert first.returncode == 0, first.stderr
    assert "llama.cpp is built for this processor, once" in first.stderr
    assert "build -DLLAVA_BUILD=OFF" in checkout.calls()
    assert "--require-hashes" in checkout.calls()
    assert (checkout.root / "site" / "appliance-checkout.pth").read_text() == f"{checkout.root}\n"
    wheel = (checkout.root / ".cache" / "engine.txt").read_text()
    assert wheel.startswith("llama-cpp-python @ file:///")
    assert re.search(r" --hash=sha256:[0-9a-f]{64}\n$", wheel)

    second = checkout.setup()
    assert (second.returncode, second.stderr, checkout.calls()) == (0, "", "")

    # The development tools come on top, with the engine that is already built, and are not taken away again.
    assert checkout.setup("dev").returncode == 0
    assert "requirements/dev.txt" in checkout.calls()
    assert "build -D" not in checkout.calls()
    assert checkout.setup("default").returncode == 0
    assert checkout.calls() == ""

    pins = checkout.root / "scripts" / "requirements" / "dev.txt"
    pins.write_text(pins.read_text() + "\n")
    assert checkout.setup().returncode == 0
    assert "requirements/dev.txt" in checkout.calls()
    assert "build -D" not in checkout.calls()


def test_another_clone_takes_the_engine_from_the_cache_but_never_one_built_otherwise(checkout: Checkout) -> None:
    checkout.setup()
    shutil.rmtree(checkout.root / ".venv")
    assert checkout.setup().returncode == 0
    assert "build -D" not in checkout.calls()
    assert checkout.setup(CMAKE_ARGS="-DGGML_NATIVE=OFF").returncode == 0
    assert "build -DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF" in checkout.calls()


def test_a_build_that_fails_shows_its_end_and_where_the_rest_is(checkout: Checkout) -> None:
    failed = checkout.setup(NO_COMPILER="1")
    assert failed.returncode == 1
    assert "cc1plus: error: it is broken" in failed.stderr
    assert "setup failed at: building llama.cpp" in failed.stderr
    assert str(checkout.root / ".cache" / "build-llama.log") in failed.stderr
    assert "what to do:" in failed.stderr
    assert not (checkout.root / ".cache" / "setup.lock").exists()


def test_an_install_that_fails_is_not_taken_for_done(checkout: Checkout) -> None:
    checkout.setup()
    failed = checkout.setup("dev", NO_NETWORK="1")
    assert failed.returncode == 1
    assert "setup failed at: installing packages" in failed.stderr
    assert "PIP_INDEX_URL" in failed.stderr
    assert checkout.setup("dev").returncode == 0
    assert "requirements/dev.txt" in checkout.calls()


def test_a_built_engine_that_does_not_run_here_is_thrown_away(checkout: Checkout) -> None:
    failed = checkout.setup(ILLEGAL_INSTRUCTION="1")
    assert failed.returncode == 1
    assert "illegal instruction" in failed.stderr
    assert "run this again: it is then built anew" in failed.stderr
    assert checkout.setup().returncode == 0
    assert "build -D" in checkout.calls()


def test_kernels_are_built_again_when_their_sources_change_and_do_not_stop_a_set_up(checkout: Checkout) -> None:
    assert checkout.setup().returncode == 0
    assert "kernels" not in checkout.calls().splitlines(), "an image's set-up runs before the program is there"
    kernels = checkout.root / "appliance" / "llamacpp" / "kernels"
    shutil.copytree(ROOT / "appliance" / "llamacpp" / "kernels", kernels)
    assert checkout.setup().returncode == 0
    assert "kernels" in checkout.calls().splitlines() and "build -D" not in checkout.calls()
    assert checkout.setup().returncode == 0
    assert checkout.calls() == ""

    (kernels / "another.cpp").write_text("int another;\n")
    failed = checkout.setup(NO_COMPILER="1")
    assert failed.returncode == 0
    assert "there is no C++ compiler" in failed.stderr and "llama.cpp's own kernels" in failed.stderr
    assert "ready" in failed.stderr


def test_a_machine_without_a_new_enough_python_is_told_what_to_install(checkout: Checkout, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "uname", "getconf", "grep", "cat", "cksum", "tr"):
        (tools / name).symlink_to(shutil.which(name) or name)
    failed = checkout.setup(PATH=str(tools), PYTHON="")
    assert failed.returncode == 1
    assert "no Python 3.11 or newer" in failed.stderr
    assert "apt install python3" in failed.stderr


def test_a_lock_that_a_dead_process_left_behind_is_taken_over(checkout: Checkout) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    (checkout.root / ".cache").mkdir()
    (checkout.root / ".cache" / "setup.lock").write_text(f"{gone.pid}\n")
    assert checkout.setup("uv").stdout == f"{checkout.root}/.tools/uv/bin/uv\n"


def test_an_unknown_set_is_refused(checkout: Checkout) -> None:
    assert "unknown set 'everything'" in checkout.setup("everything").stderr
