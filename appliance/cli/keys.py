"""appliance keys: API keys, shown once and stored as a hash."""

import hashlib
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.table import Table

from appliance.cli.options import ConfigOption, DataDirOption, JsonOption, resolve_data_dir
from appliance.cli.output import exit_on_error, fail, say, say_json, stdout
from appliance.config import KeySettings, load_config
from appliance.ledger.keys import add_key, list_keys, revoke_key
from appliance.serve import locate_ledger

_PREFIX = "apl_"

NameArgument = Annotated[str, typer.Argument(help="Who uses the key, for example billing-batch.")]
ResidencyOption = Annotated[str, typer.Option(help="Binds everything sent with it: onsite, region:XX or any.")]
AdminOption = Annotated[bool, typer.Option("--admin", help="It may read every decision and the metrics, and reload.")]
TierOption = Annotated[str | None, typer.Option(help="A label of your own that routes can match, for example free.")]
RoutesOption = Annotated[list[str] | None, typer.Option("--route", help="A route it may use, repeatable; empty: all.")]
MinuteOption = Annotated[int | None, typer.Option(help="Requests it may send in a minute.")]
DailyOption = Annotated[float | None, typer.Option(help="What it may cost in hosted calls a day.")]


def create_command(
    name: NameArgument,
    residency: ResidencyOption = "any",
    admin: AdminOption = False,
    tier: TierOption = None,
    route: RoutesOption = None,
    requests_per_minute: MinuteOption = None,
    daily_usd: DailyOption = None,
    config_path: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Make a key. It is printed once and only its SHA-256 is kept; a running node knows it within seconds."""
    text = _PREFIX + secrets.token_urlsafe(32)
    settings = {
        "name": name,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "scopes": ("client", "admin") if admin else ("client",),
        "residency": residency,
        "tier": tier,
        "routes": tuple(route) if route else None,
        "requests_per_minute": requests_per_minute,
        "daily_usd": daily_usd,
    }
    try:
        key = KeySettings.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        fail(f"{first['loc'][0]}: {first['msg'].removeprefix('Value error, ')} (it is {first['input']!r})")
    url = _url(config_path, data_dir)
    exit_on_error(lambda: add_key(url, key))
    say(f"The key of {name}, shown this once:\n\n    {text}\n")


def list_command(config_path: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Every key made by command, with what it may do. Nobody can read the keys themselves."""
    url = _url(config_path, data_dir)
    rows: list[dict[str, Any]] = [
        {**stored.key.model_dump(mode="json"), "created_at": stored.created_at, "revoked_at": stored.revoked_at}
        for stored in exit_on_error(lambda: list_keys(url))
    ]
    if as_json:
        say_json([{name: value for name, value in row.items() if name != "sha256"} for row in rows])
        return
    columns = ("name", "scopes", "residency", "tier", "routes", "a minute", "USD a day", "made", "revoked")
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        limits = (row["tier"], row["routes"] and " ".join(row["routes"]), row["requests_per_minute"], row["daily_usd"])
        shown = ["" if limit is None else str(limit) for limit in limits]
        dates = (_date(row["created_at"]), _date(row["revoked_at"]))
        table.add_row(row["name"], " ".join(row["scopes"]), row["residency"], *shown, *dates)
    stdout.print(table)


def revoke_command(name: NameArgument, config_path: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """Make a key useless; a running node refuses it within seconds."""
    url = _url(config_path, data_dir)
    exit_on_error(lambda: revoke_key(url, name))
    say(f"{name} is revoked")


def _url(config_path: Path | None, data_dir: Path | None) -> str:
    config = exit_on_error(lambda: load_config(config_path))
    home = resolve_data_dir(data_dir, config)
    home.mkdir(parents=True, exist_ok=True)
    return locate_ledger(config, home)


def _date(at: float | None) -> str:
    return "" if at is None else datetime.fromtimestamp(at, UTC).isoformat(" ", timespec="minutes")
