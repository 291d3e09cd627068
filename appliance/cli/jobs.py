"""appliance jobs: batches of a running node: what there is, how they go, and an end to one."""

import time
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from appliance.cli.node_client import KEY_VARIABLE, NodeApiClient, UrlOption
from appliance.cli.options import ConfigOption, JsonOption
from appliance.cli.output import say, say_json, stderr, stdout
from appliance.core.json_types import JsonObject

_ENDED = ("completed", "failed", "expired", "cancelled")

BatchArgument = Annotated[str, typer.Argument(metavar="BATCH", help="Its id, as `appliance jobs list` shows it.")]
KeyOption = Annotated[str | None, typer.Option(help=f"An API key; empty: {KEY_VARIABLE}. Admins see everybody's.")]


def list_command(
    limit: Annotated[int, typer.Option(help="How many, newest first.", min=1, max=100)] = 20,
    url: UrlOption = None,
    key: KeyOption = None,
    config_path: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Batches, newest first: how far they are, how fast, and when they will be done."""
    found = NodeApiClient(url, key, config_path).get(f"/v1/batches?limit={limit}")
    if as_json:
        say_json(found["data"])
        return
    table = Table("batch", "endpoint", "status", "lines", "done", "failed", "a second", "ready", "made", box=None)
    for batch in found["data"]:
        counts, facts = batch["request_counts"], batch["appliance"]
        state = batch["status"] if facts["state"] in ("running", "ended") else f"{batch['status']} ({facts['state']})"
        rate = facts.get("lines_per_second")
        table.add_row(
            batch["id"],
            batch["endpoint"],
            state,
            *(str(counts[name]) for name in ("total", "completed", "failed")),
            "" if rate is None else f"{rate:.1f}",
            _when(facts.get("eta_at")),
            _when(batch["created_at"]),
        )
    stdout.print(table)


def watch_command(
    batch_id: BatchArgument,
    every_seconds: Annotated[float, typer.Option("--every", help="Seconds between two looks.", min=0.1)] = 1.0,
    url: UrlOption = None,
    key: KeyOption = None,
    config_path: ConfigOption = None,
) -> None:
    """Follow one batch until it has ended; ends with 0 if it was completed."""
    node = NodeApiClient(url, key, config_path)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, TimeElapsedColumn(), console=stderr) as progress:
        task = progress.add_task("", total=None, text="")
        while True:
            batch = node.get(f"/v1/batches/{batch_id}")
            counts = batch["request_counts"]
            progress.update(
                task,
                description=batch["status"],
                total=counts["total"] or None,
                completed=counts["completed"] + counts["failed"],
                text=_progress_text(batch),
            )
            if batch["status"] in _ENDED:
                break
            time.sleep(every_seconds)
    say(_ending_text(batch))
    if batch["status"] != "completed":
        raise typer.Exit(1)


def cancel_command(
    batch_id: BatchArgument, url: UrlOption = None, key: KeyOption = None, config_path: ConfigOption = None
) -> None:
    """End a batch: what it has answered is kept, and the other lines are named in its error file."""
    batch = NodeApiClient(url, key, config_path).post(f"/v1/batches/{batch_id}/cancel")
    say(f"{batch_id} is {batch['status']}")


def _progress_text(batch: JsonObject) -> str:
    facts, parts = batch["appliance"], []
    if batch["request_counts"]["failed"]:
        parts.append(f"{batch['request_counts']['failed']} failed")
    if facts.get("lines_per_second") is not None:
        parts.append(f"{facts['lines_per_second']:.1f}/s")
    if facts.get("eta_seconds") is not None:
        parts.append(f"{_duration(facts['eta_seconds'])} left")
    if facts["state"] in ("paused", "waiting"):
        parts.append(f"{facts['state']}: {facts['reason']}")
    return ", ".join(parts)


def _ending_text(batch: JsonObject) -> str:
    counts, facts = batch["request_counts"], batch["appliance"]
    lines = [
        f"{batch['id']} is {batch['status']}: {counts['completed']} of {counts['total']} lines answered "
        f"({facts['onsite']} on-site, {facts['hosted']} hosted, {facts['copied']} copied), {counts['failed']} failed"
    ]
    lines += [f"  {name}: {batch[name]}" for name in ("output_file_id", "error_file_id") if batch[name]]
    errors = (batch["errors"] or {}).get("data", [])
    lines += [f"  line {one['line']}: {one['message']}" if one["line"] else f"  {one['message']}" for one in errors[:3]]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _when(at: float | None) -> str:
    return "" if at is None else datetime.fromtimestamp(at, UTC).isoformat(" ", timespec="minutes")[:16]
