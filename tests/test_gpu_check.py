"""scripts/gpu-check: how it judges, what it packs, and that a machine without a GPU is told so."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.node.hardware.nvidia import load_nvml
from scripts.gpu_check.environment import vllm_of, wrapped
from scripts.gpu_check.judge import compared, goals, verdict
from scripts.gpu_check.load import _tokens, prompt
from scripts.gpu_check.pack import wanted
from tests.vllm_cpu import real_vllm

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "gpu-check"


def memory(predicted: float | None, actual: float | None) -> list[object]:
    return [compared("kv_tokens", predicted, actual)]


@pytest.mark.parametrize(
    ("predicted", "actual", "share", "failures", "expected"),
    [
        (95.0, 100.0, 0.99, [], "passed"),
        (105.0, 100.0, 0.98, [], "passed"),
        (94.0, 100.0, 0.99, [], "missed"),
        (106.0, 100.0, 0.99, [], "missed"),
        (100.0, 100.0, 0.97, [], "missed"),
        (100.0, 100.0, None, [], "missed"),
        (100.0, None, 0.99, [], "missed"),
        (100.0, 100.0, 0.99, ["energy: gone"], "failed"),
    ],
)
def test_a_run_passes_when_memory_and_throughput_keep_what_is_promised(
    predicted: float | None, actual: float | None, share: float | None, failures: list[str], expected: str
) -> None:
    made = goals(memory(predicted, actual), {"whole": {"share": share}})  # type: ignore[arg-type]
    assert verdict(made, failures) == expected


def test_a_run_that_measured_nothing_has_not_passed() -> None:
    assert verdict(goals([], {}), []) == "missed"


def test_how_far_off_a_prediction_was_is_of_what_there_is() -> None:
    assert compared("x", 110.0, 100.0)["off"] == pytest.approx(0.1)
    assert compared("x", 110.0, None)["off"] is None


@pytest.mark.skipif(load_nvml() is not None, reason="this machine may have a GPU")
def test_a_machine_without_a_gpu_is_told_so_and_nothing_is_recorded(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [SCRIPT, "--out", tmp_path], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    assert done.returncode == 3 and "no GPU here" in done.stderr and "--cpu" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_script_has_no_fault_that_shellcheck_knows() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True, check=False)
    assert os.access(SCRIPT, os.X_OK) and done.returncode == 0, done.stdout


def fake_python(folder: Path, version: str) -> Path:
    """An interpreter that can import a vLLM which lies on its PYTHONPATH."""
    distribution = folder / "site" / f"vllm-{version}.dist-info"
    distribution.mkdir(parents=True)
    (distribution / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return folder / "site"


def test_a_vllm_that_an_interpreter_can_import_becomes_an_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = fake_python(tmp_path, "0.26.0")
    monkeypatch.setenv("PYTHONPATH", str(site))
    found = vllm_of(None, sys.executable, cpu=False, scratch=tmp_path / "it's here")
    assert not isinstance(found, str) and found.version == "0.26.0" and not found.is_cpu
    # Engines are started without the node's PYTHONPATH; this one's packages are found all the same.
    asked = "import importlib.metadata as m; print(m.version('vllm'))"
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([found.python, "-c", asked], capture_output=True, text=True, check=True, env=bare)
    assert done.stdout.strip() == "0.26.0"
    assert os.access(found.program, os.X_OK)


def test_an_interpreter_without_vllm_is_told_with_its_own_words(tmp_path: Path) -> None:
    found = wrapped(sys.executable, tmp_path)
    assert isinstance(found, str) and "cannot import vLLM" in found and "vllm" in found
    missing = vllm_of(tmp_path, None, cpu=False, scratch=tmp_path)
    assert isinstance(missing, str) and "no environment with vLLM" in missing


def test_what_is_packed_is_pinned_and_for_the_python_that_was_asked_for() -> None:
    pins = (
        "aiohttp==3.14.5 \\\n    --hash=sha256:aa\n"
        "scikit-learn==1.8.0 \\\n"
        "backport==1.0 ; python_full_version < '3.12' \\\n"
        "newer==2.0 ; python_version >= '3.12' \\\n"
        "colorama==0.4.6 ; sys_platform == 'win32' \\\n"
        "uvloop==0.23.0 ; sys_platform != 'win32' \\\n"
    )
    assert wanted(pins, "3.12") == ["aiohttp==3.14.5", "newer==2.0", "uvloop==0.23.0"]
    real = wanted((ROOT / "scripts/requirements/default.txt").read_text("utf-8"), "3.12")
    names = {one.partition("==")[0] for one in real}
    assert {"fastapi", "sqlalchemy", "uvicorn", "typer", "nvidia-ml-py", "aiohttp"} <= names
    assert "llama-cpp-python" not in names, "it would have to be compiled, and vLLM alone is checked"


def test_tokens_are_read_of_whole_answers_and_of_streams() -> None:
    assert _tokens('{"usage": {"completion_tokens": 7}}', stream=False) == 7
    assert _tokens('{"answers": []}', stream=False) == 0
    stream = 'data: {"choices": [{}]}\n\ndata: {"choices": [], "usage": {"completion_tokens": 5}}\n\ndata: [DONE]\n\n'
    assert _tokens(stream, stream=True) == 5
    with pytest.raises(ValueError, match="without its usage"):
        _tokens("data: [DONE]\n", stream=True)


def test_no_two_prompts_begin_alike() -> None:
    assert len({prompt(seed, 10)[:4] for seed in range(1000, 1100)}) > 90


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_all_steps_run_against_vllms_build_for_cpus(tmp_path: Path) -> None:
    vllm = real_vllm()
    arguments: list[str | Path] = [
        "--cpu",
        "--vllm",
        vllm.environment.folder,
        "--model",
        vllm.weights,
        "--option=--enforce-eager",
    ]
    arguments += ["--runs", "1", "--requests", "4", "--sequences", "2", "--tokens", "4", "--out", tmp_path]
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run([SCRIPT, *arguments], check=False, env=environment, cwd=ROOT, timeout=450)
    (path,) = tmp_path.glob("gpu-check-cpu-*.json")
    report = json.loads(path.read_text())
    assert report["kind"] == "cpu" and report["failures"] == []
    assert abs(report["memory"]["rows"][0]["off"]) < 0.05
    assert report["throughput"]["whole"]["share"] > 0 and report["decisions"]["batch"]["decisions_per_second"] > 0
    assert report["energy"]["ledger_joules"] > 0 and report["energy"]["extra_joules"] is None
    shutil.rmtree(tmp_path)
