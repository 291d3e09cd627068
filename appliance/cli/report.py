"""appliance report: requests, tokens, cost and share by target, from the ledger."""

import time
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table

from appliance.cli.options import ConfigOption, DataDirOption, JsonOption, resolve_data_dir
from appliance.cli.output import exit_on_error, say, say_json, stdout
from appliance.config import load_config
from appliance.ledger.report import Report, offline_report
from appliance.serve import locate_ledger


def report_command(
    days: Annotated[float, typer.Option(help="How far back.", min=0.001, max=3660)] = 1.0,
    config_path: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """What was asked, who answered, and what it cost. Works while the node runs and when it does not."""
    config = exit_on_error(lambda: load_config(config_path))
    url = locate_ledger(config, resolve_data_dir(data_dir, config))
    now = time.time()
    report = exit_on_error(lambda: offline_report(url, since_at=now - days * 86_400, until_at=now + 1))
    if as_json:
        say_json(report.to_dict())
    else:
        _print(report)


def _print(report: Report) -> None:
    since = datetime.fromtimestamp(report.since_at, UTC).isoformat(timespec="minutes")
    say(f"since {since}: {report.requests} requests, {report.answered} answered, {report.cost_usd:.6f} USD")
    counted = ("requests", "share", "prompt tokens", "cached", "output tokens", "energy J", "cost USD")
    table = Table("target", "location", *counted, box=None, pad_edge=False)
    for row in report.targets:
        tokens = (row.prompt_tokens, row.cached_tokens, row.completion_tokens)
        joules = f"{row.energy_joules:.1f}" if row.location == "onsite" else ""
        cost = f"{row.cost_usd:.6f}"
        table.add_row(row.target, row.location, str(row.requests), f"{row.share:.1%}", *map(str, tokens), joules, cost)
    stdout.print(table)
    say(f"overflowed {report.overflowed}, fell back {report.fell_back}, escalated {report.escalated}")
    bound = ", ".join(f"{count} {name}" for name, count in report.bound.items()) or "none"
    say(f"bound: {bound}; left the site: {report.left_site}; bound to the site and left: {report.onsite_bound_left}")
    for code, count in report.errors.items():
        say(f"ended with {code}: {count}")
    if report.unsettled:
        say(f"{report.unsettled} calls are not settled; up to {report.unsettled_usd:.6f} USD of the cost is theirs")
    if report.unpriced_attempts:
        say(f"{report.unpriced_attempts} calls used tokens at a cost nobody knows; they are in no sum")
    if report.energy_joules:
        share = report.measured_joules / report.energy_joules
        say(f"energy on-site: {report.energy_joules:.1f} J beyond idling, {share:.0%} of it metered")
    if report.assumed_usd:
        say(
            f"{report.assumed_usd:.6f} USD of the on-site cost is assumed: set usd_per_kwh under [cost], and "
            "watts_per_busy_core where no meter can be read (`appliance doctor` says which)"
        )
