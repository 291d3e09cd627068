"""appliance jobs: batches of a running node: what there is, how they go, and an end to one."""

import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from appliance.cli.options import ConfigOption, JsonOption
from appliance.cli.output import fail, guarded, say, say_json, stderr, stdout
from appliance.config import load_config

app = typer.Typer(help="Batches of a running node.", no_args_is_help=True)

KEY_VARIABLE = "APPLIANCE_KEY"
_ENDED = ("completed", "failed", "expired", "cancelled")
_SECONDS = 30.0

BatchArgument = Annotated[str, typer.Argument(metavar="BATCH", help="Its id, as `appliance jobs list` shows it.")]
UrlOption = Annotated[str | None, typer.Option(help="Where the node is; empty: as configured, on this machine.")]
KeyOption = Annotated[str | None, typer.Option(help=f"An API key; empty: {KEY_VARIABLE}. Admins see everybody's.")]


@app.command("list")
def list_command(
    limit: Annotated[int, typer.Option(help="How many, newest first.", min=1, max=100)] = 20,
    url: UrlOption = None,
    key: KeyOption = None,
    config_path: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Batches, newest first: how far they are, how fast, and when they will be done."""
    found = _Node(url, key, config_path).get(f"/v1/batches?limit={limit}")
    if as_json:
        say_json(found["data"])
        return
    table = Table("batch", "endpoint", "status", "lines", "done", "failed", "a second", "ready", "made", box=None)
    for batch in found["data"]:
        counts, told = batch["request_counts"], batch["appliance"]
        state = batch["status"] if told["state"] in ("running", "ended") else f"{batch['status']} ({told['state']})"
        rate = told.get("lines_per_second")
        table.add_row(
            batch["id"],
            batch["endpoint"],
            state,
            *(str(counts[name]) for name in ("total", "completed", "failed")),
            "" if rate is None else f"{rate:.1f}",
            _when(told.get("eta_at")),
            _when(batch["created_at"]),
        )
    stdout.print(table)


@app.command()
def watch(
    batch_id: BatchArgument,
    every_seconds: Annotated[float, typer.Option("--every", help="Seconds between two looks.", min=0.1)] = 1.0,
    url: UrlOption = None,
    key: KeyOption = None,
    config_path: ConfigOption = None,
) -> None:
    """Follow one batch until it has ended; ends with 0 if it was completed."""
    node = _Node(url, key, config_path)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"))
    with Progress(*columns, TimeElapsedColumn(), console=stderr) as progress:
        task = progress.add_task("", total=None, told="")
        while True:
            batch = node.get(f"/v1/batches/{batch_id}")
            counts = batch["request_counts"]
            progress.update(
                task,
                description=batch["status"],
                total=counts["total"] or None,
                completed=counts["completed"] + counts["failed"],
                told=_told(batch),
            )
            if batch["status"] in _ENDED:
                break
            time.sleep(every_seconds)
    say(_ending(batch))
    if batch["status"] != "completed":
        raise typer.Exit(1)


@app.command()
def cancel(
    batch_id: BatchArgument, url: UrlOption = None, key: KeyOption = None, config_path: ConfigOption = None
) -> None:
    """End a batch: what it has answered is kept, and the other lines are named in its error file."""
    batch = _Node(url, key, config_path).post(f"/v1/batches/{batch_id}/cancel")
    say(f"{batch_id} is {batch['status']}")


class _Node:
    """A running node, asked over HTTP. What it refuses ends the program with its sentence."""

    def __init__(self, url: str | None, key: str | None, config_path: Path | None) -> None:
        text = key or os.environ.get(KEY_VARIABLE)
        self._url = (url or _configured(config_path)).removesuffix("/")
        self._headers = {"authorization": f"Bearer {text}"} if text else {}

    def get(self, path: str) -> Mapping[str, Any]:
        return self._ask("GET", path)

    def post(self, path: str) -> Mapping[str, Any]:
        return self._ask("POST", path)

    def _ask(self, method: str, path: str) -> Mapping[str, Any]:
        try:
            reply = httpx.request(method, self._url + path, headers=self._headers, timeout=_SECONDS, trust_env=False)
        except httpx.HTTPError as error:
            fail(f"no node answers at {self._url} ({error}): start it, or say where it is with --url")
        try:
            found: Any = reply.json()
        except ValueError:
            fail(f"{self._url} answered {reply.status_code} with something that is not JSON: is that a node?")
        if reply.status_code != 200:
            fail(found["error"]["message"] if isinstance(found, dict) and "error" in found else str(found)[:300])
        return dict(found)


def _configured(config_path: Path | None) -> str:
    server = guarded(lambda: load_config(config_path)).server
    host = "127.0.0.1" if server.host in ("0.0.0.0", "::") else server.host
    return f"http://{f'[{host}]' if ':' in host else host}:{server.port}"


def _told(batch: Mapping[str, Any]) -> str:
    told, parts = batch["appliance"], []
    if batch["request_counts"]["failed"]:
        parts.append(f"{batch['request_counts']['failed']} failed")
    if told.get("lines_per_second") is not None:
        parts.append(f"{told['lines_per_second']:.1f}/s")
    if told.get("eta_seconds") is not None:
        parts.append(f"{_duration(told['eta_seconds'])} left")
    if told["state"] in ("paused", "waiting"):
        parts.append(f"{told['state']}: {told['reason']}")
    return ", ".join(parts)


def _ending(batch: Mapping[str, Any]) -> str:
    counts, told = batch["request_counts"], batch["appliance"]
    lines = [
        f"{batch['id']} is {batch['status']}: {counts['completed']} of {counts['total']} lines answered "
        f"({told['onsite']} on-site, {told['hosted']} hosted, {told['copied']} copied), {counts['failed']} failed"
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
