"""appliance tasks: what is asked again and again, saved at a node under a name."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import orjson
import typer
from rich.table import Table

from appliance.cli.node_client import KEY_VARIABLE, NodeApiClient, UrlOption
from appliance.cli.options import ConfigOption, JsonOption
from appliance.cli.output import fail, say, say_json, stdout
from appliance.core.json_types import JsonObject, MutableJsonObject

_PATH = "/v1/tasks"

NameArgument = Annotated[str, typer.Argument(help="What requests give in their field `task`.")]
KeyOption = Annotated[
    str | None, typer.Option(help=f"An API key; empty: {KEY_VARIABLE}. Changes need the scope admin.")
]


def save_command(
    name: NameArgument,
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON or TOML: questions or a schema, and what goes with them.")
    ],
    examples_path: Annotated[
        Path | None, typer.Option("--examples", help="JSON Lines: {input or text, label}, or {text, object}.")
    ] = None,
    classifier: Annotated[str | None, typer.Option(help="Asked where a request names no model.")] = None,
    model: Annotated[str | None, typer.Option(help="Asked where a request names none.")] = None,
    url: UrlOption = None,
    key: KeyOption = None,
    config_path: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Save a task, or a new version of it. FILE has the fields of `POST /v1/tasks` but the name."""
    body: MutableJsonObject = {**_definition(path), "name": name}
    if examples_path is not None:
        body["examples"] = _examples(examples_path, extraction="schema" in body)
    body |= {field: value for field, value in (("classifier", classifier), ("model", model)) if value is not None}
    saved = NodeApiClient(url, key, config_path).post(_PATH, body)
    say_json(saved) if as_json else say(f"saved {saved['kind']} {saved['name']}, version {saved['version']}")


def list_command(
    url: UrlOption = None, key: KeyOption = None, config_path: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """Every task that the key may use, and names that were calibrated without being saved."""
    rows = NodeApiClient(url, key, config_path).get(_PATH)["data"]
    if as_json:
        say_json(rows)
        return
    table = Table("task", "kind", "version", "asks", "examples", "calibrated for", "made", box=None, pad_edge=False)
    for row in rows:
        fits = ", ".join(fit["target"] for fit in row["calibrated"] if fit["applies"])
        version = "" if row["version"] is None else str(row["version"])
        count = str(len(row.get("examples") or ())) if version else ""
        table.add_row(row["name"], row["kind"], version, _asks(row), count, fits, row.get("made_at") or "")
    stdout.print(table)


def show_command(
    name: NameArgument,
    version: Annotated[int | None, typer.Option("--version", help="Which version; empty: the newest.")] = None,
    url: UrlOption = None,
    key: KeyOption = None,
    config_path: ConfigOption = None,
) -> None:
    """One task as JSON, as it can be saved again."""
    query = "" if version is None else f"?version={version}"
    say_json(NodeApiClient(url, key, config_path).get(f"{_task_path(name)}{query}"))


def remove_command(
    name: NameArgument, url: UrlOption = None, key: KeyOption = None, config_path: ConfigOption = None
) -> None:
    """Delete a task with all its versions, and what was calibrated under its name."""
    NodeApiClient(url, key, config_path).delete(_task_path(name))
    say(f"removed {name}")


def _task_path(name: str) -> str:
    return f"{_PATH}/{quote(name)}"


def _asks(row: JsonObject) -> str:
    if row["kind"] == "extraction":
        return ", ".join((row["schema"].get("properties") or {}).keys())
    names = [str(one.get("name") or one["type"]) for one in row.get("questions") or ()]
    return ", ".join([*names, *([f"classifier/{row['classifier']}"] if row.get("classifier") else [])])


def _definition(path: Path) -> JsonObject:
    raw = _read(path)
    try:
        found = tomllib.loads(raw.decode()) if path.suffix == ".toml" else orjson.loads(raw)
    except (orjson.JSONDecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        fail(f"{path} is not valid {'TOML' if path.suffix == '.toml' else 'JSON'}: {error}")
    if not isinstance(found, dict):
        fail(f"{path} holds no object: it has the fields of POST /v1/tasks")
    # What `show` printed can be saved again.
    given_by_node = ("object", "version", "versions", "made_at", "calibrated")
    return {field: value for field, value in found.items() if field not in given_by_node and value is not None}


def _examples(path: Path, *, extraction: bool) -> Sequence[Any]:
    """The file's lines. A decision's `text` is taken for `input`, as many files name it."""
    rows = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            fail(f"{path}:{number} is not valid JSON: {error}")
        if not isinstance(row, dict):
            fail(f"{path}:{number} is no object: each line is one example")
        if not extraction and "text" in row and "input" not in row:
            row = {"input": row["text"], **{field: value for field, value in row.items() if field != "text"}}
        rows.append(row)
    return rows


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror}")
