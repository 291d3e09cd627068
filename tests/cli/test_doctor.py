"""appliance doctor, as it is typed."""

import json
from pathlib import Path

from typer.testing import CliRunner

from appliance.cli import app

RUN = CliRunner(env={"COLUMNS": "250", "OMP_NUM_THREADS": "", "OMP_WAIT_POLICY": ""})


def config(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "appliance.toml"
    path.write_text(text)
    path.chmod(0o600)
    return ["--config", str(path), "--data-dir", str(tmp_path / "data")]


def test_a_machine_that_can_serve_ends_with_0_and_says_what_was_looked_at(tmp_path: Path) -> None:
    done = RUN.invoke(app, ["doctor", "--json", *config(tmp_path, "[server]\nport = 0\n")])
    told = json.loads(done.stdout)
    assert done.exit_code == 0 and told["ok"] is True, done.stdout
    checks = {finding["check"] for finding in told["findings"]}
    assert {"configuration", "disk", "ledger", "clock", "memory", "llama.cpp", "packages", "GPU driver"} <= checks
    assert not (tmp_path / "data").exists(), "it changes nothing"


def test_what_keeps_a_node_from_running_ends_with_1_and_has_a_remedy(tmp_path: Path) -> None:
    done = RUN.invoke(app, ["doctor", *config(tmp_path, '[server]\nhost = "0.0.0.0"\nport = 0\n')])
    assert done.exit_code == 1
    assert "no API keys" in done.stdout and "-> appliance keys create NAME" in done.stdout


def test_a_mistake_in_the_configuration_is_one_finding_among_the_others(tmp_path: Path) -> None:
    done = RUN.invoke(app, ["doctor", "--json", *config(tmp_path, "[server]\nprot = 1\n")])
    told = json.loads(done.stdout)
    first = told["findings"][0]
    assert done.exit_code == 1 and first["level"] == "error" and "prot" in first["text"]
    assert len(told["findings"]) > 10


def test_warnings_count_where_one_is_strict(tmp_path: Path) -> None:
    arguments = config(tmp_path, "[server]\nport = 0\n")
    (tmp_path / "data").mkdir(mode=0o755)
    (tmp_path / "data").chmod(0o755)
    assert RUN.invoke(app, ["doctor", *arguments]).exit_code == 0
    assert RUN.invoke(app, ["doctor", "--strict", *arguments]).exit_code == 1
