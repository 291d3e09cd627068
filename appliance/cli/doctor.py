"""appliance doctor: what is wrong with this machine for a node, each finding with its remedy."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from appliance.api.auth import is_loopback
from appliance.cli.options import ConfigOption, DataDirOption, JsonOption, resolve_data_dir
from appliance.cli.output import say_json, stdout
from appliance.config import NodeConfig, load_config
from appliance.errors import ConfigError
from appliance.node.doctor.checks import run_checks
from appliance.node.doctor.gather import gather_facts
from appliance.node.doctor.models import DoctorFacts
from appliance.serve import locate_ledger

_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def doctor_command(
    config_path: ConfigOption = None,
    data_dir: DataDirOption = None,
    full: Annotated[bool, typer.Option("--full", help="Read models and ledgers of any size.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings end with exit code 1, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Look at everything that a node depends on, and say what to do about what is wrong. Changes nothing.

    Exit code 0: nothing keeps a node from running (warnings are told); 1: something does; 2: used wrongly.
    """
    facts = _gather(config_path, data_dir, full=full)
    findings = run_checks(facts)
    worst = {finding.level for finding in findings}
    is_well = "error" not in worst and not (strict and "warning" in worst)
    if as_json:
        say_json({"ok": is_well, "findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            sign = f"[{_COLOURS[finding.level]}]{finding.level:<9}[/]"
            stdout.print(f"{sign} {finding.check:<14} {escape(finding.text)}", soft_wrap=True)
            if finding.remedy:
                stdout.print(f"{'':<9} {'':<14} -> {escape(finding.remedy)}", soft_wrap=True)
    raise typer.Exit(0 if is_well else 1)


def _gather(config_path: Path | None, data_dir: Path | None, *, full: bool) -> DoctorFacts:
    problem = None
    try:
        config = load_config(config_path)
    except ConfigError as error:
        config, problem = NodeConfig(), str(error)
    home = resolve_data_dir(data_dir, config)
    return gather_facts(
        config,
        home,
        ledger_url=locate_ledger(config, home),
        is_loopback=is_loopback(config.server.host),
        config_path=config_path,
        config_problem=problem,
        full=full,
    )
