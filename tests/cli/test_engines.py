"""appliance engines: what is listed, and what is said where nothing can be done."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from appliance.cli import app


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    return tmp_path / "appliance" / "engines"


def _make(folder: Path, version: str) -> Path:
    (folder / "lib" / "python3.12" / "site-packages" / f"vllm-{version}.dist-info").mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / "bin" / "vllm").touch()
    return folder


@pytest.mark.usefixtures("cache")
def test_where_there_is_none_the_command_that_gets_it_is_named() -> None:
    done = CliRunner().invoke(app, ["engines", "list"])
    assert done.exit_code == 0 and "appliance engines install vllm" in done.stdout


def test_the_list_says_which_one_the_node_uses(cache: Path) -> None:
    old, new = _make(cache / "vllm-0.32.0", "0.32.0"), _make(cache / "vllm-0.33.0", "0.33.0")
    rows = json.loads(CliRunner().invoke(app, ["engines", "list", "--json"]).stdout)
    assert [(row["folder"], row["used"]) for row in rows] == [(str(new), True), (str(old), False)]


def test_one_is_removed_by_its_version_and_an_unknown_one_is_told(cache: Path) -> None:
    folder = _make(cache / "vllm-0.32.0", "0.32.0")
    refused = CliRunner().invoke(app, ["engines", "remove", "0.31.0"])
    assert refused.exit_code == 1 and "there are: 0.32.0" in refused.stderr
    assert CliRunner().invoke(app, ["engines", "remove", "0.32.0"]).exit_code == 0
    assert not folder.exists()


@pytest.mark.usefixtures("cache")
def test_only_vllm_can_be_installed() -> None:
    done = CliRunner().invoke(app, ["engines", "install", "sglang"])
    assert done.exit_code == 1 and "vllm can" in done.stderr
