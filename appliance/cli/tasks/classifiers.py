"""appliance classifiers: train them on labelled examples, look at how good they are, keep their versions."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import orjson
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from appliance.cli.options import ConfigOption, JsonOption
from appliance.cli.output import fail, guarded, say, say_json, stderr, stdout
from appliance.cli.tasks.cascade_traffic import print_traffic
from appliance.config import load_config

app = typer.Typer(help="Classifiers: trained here on labelled examples.", no_args_is_help=True)

KEY_VARIABLE = "APPLIANCE_KEY"
_PATH = "/v1/classifiers"
_POLL_SECONDS = 0.3
_LONGEST_LINE_BYTES = 1_000_000
_SHOWN_CLASSES = 10

NameArgument = Annotated[str, typer.Argument(help="The classifier; requests name it as classifier/NAME.")]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="JSON Lines or CSV with text and label.")]
UrlOption = Annotated[str | None, typer.Option(help="Where the node is; empty: as configured, on this machine.")]
KeyOption = Annotated[str | None, typer.Option(help=f"An API key with the scope admin; empty: {KEY_VARIABLE}.")]
EncodingOption = Annotated[str, typer.Option(help="How the file is written, for example latin-1.")]
VersionOption = Annotated[int | None, typer.Option("--version", help="Which version; empty: the one that serves.")]


class _Node:
    """The node's API for classifiers; mistakes end the program with their sentence."""

    def __init__(self, url: str | None, key: str | None, config_path: Path | None) -> None:
        text = key or os.environ.get(KEY_VARIABLE)
        self._url = (url or _url(config_path)).rstrip("/")
        self._headers = {"authorization": f"Bearer {text}"} if text else {}

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        content = None if body is None else orjson.dumps(body)
        headers = {**self._headers, "content-type": "application/json"}
        try:
            # No limit to the wait: many examples take a small machine minutes.
            reply = httpx.request(method, self._url + path, content=content, headers=headers, timeout=None)
            told = reply.json()
        except (httpx.HTTPError, ValueError) as error:
            fail(f"{self._url} did not answer as a node does ({error or type(error).__name__}): start it or give --url")
        if reply.status_code >= 400:
            reason = told.get("error") if isinstance(told, dict) else None
            fail(str(reason.get("message") if isinstance(reason, dict) else told))
        found: Mapping[str, Any] = told
        return found


@app.command()
def train(
    name: NameArgument,
    examples_path: FileArgument,
    accuracy: Annotated[
        float | None, typer.Option(help="Wanted on held-out examples; the cheapest features that reach it are taken.")
    ] = None,
    tier: Annotated[str, typer.Option(help="The dearest features that may be used: words or encoder.")] = "encoder",
    encoder: Annotated[str | None, typer.Option(help="Which embedding model; empty: the first that is here.")] = None,
    keep_examples: Annotated[
        bool,
        typer.Option("--keep-examples", help="Keep the examples at the node, for versions that learn from traffic."),
    ] = False,
    encoding: EncodingOption = "utf-8",
    url: UrlOption = None,
    key: KeyOption = None,
    config_path: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a new version at the running node; it serves as soon as it is written. Ctrl-C cancels."""
    node = _Node(url, key, config_path)
    body: dict[str, Any] = {"name": name, **_examples(examples_path, encoding), "tier": tier}
    body["keep_examples"] = keep_examples
    body |= {field: value for field, value in (("accuracy", accuracy), ("encoder", encoder)) if value is not None}
    node.ask("POST", _PATH, body)
    try:
        run = _follow(node, name)
    except KeyboardInterrupt:
        node.ask("DELETE", f"{_one(name)}/training")
        fail("cancelled; what served before still serves", code=130)
    if run["state"] != "done":
        fail(f"the training {run['state']}: {run['error'] or 'no reason was given'}")
    told = node.ask("GET", _one(name))
    say_json(told) if as_json else _print(told)


@app.command("list")
def list_command(
    url: UrlOption = None, key: KeyOption = None, config_path: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """Every classifier of the node."""
    rows = _Node(url, key, config_path).ask("GET", _PATH)["data"]
    if as_json:
        say_json(rows)
        return
    columns = ("classifier", "version", "labels", "examples", "features", "accuracy", "macro F1", "ECE", "made")
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        figures = (f"{row[name]:.3f}" for name in ("accuracy", "macro_f1", "ece"))
        counts = (str(row[name]) for name in ("version", "labels", "examples"))
        table.add_row(row["name"], *counts, row["recipe"], *figures, row["made_at"])
    stdout.print(table)


@app.command()
def show(
    name: NameArgument,
    version: VersionOption = None,
    url: UrlOption = None,
    key: KeyOption = None,
    config_path: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """How good a classifier is on examples that it was not fitted on."""
    query = "" if version is None else f"?version={version}"
    told = _Node(url, key, config_path).ask("GET", _one(name) + query)
    say_json(told) if as_json else _print(told)


@app.command()
def evaluate(
    name: NameArgument,
    examples_path: FileArgument,
    version: VersionOption = None,
    encoding: EncodingOption = "utf-8",
    url: UrlOption = None,
    key: KeyOption = None,
    config_path: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a classifier on other examples."""
    body = _examples(examples_path, encoding)
    if version is not None:
        body["version"] = version
    told = _Node(url, key, config_path).ask("POST", f"{_one(name)}/evaluate", body)
    if as_json:
        say_json(told)
        return
    say(f"classifier/{name}, version {told['version']}, on {told['rows']} examples:")
    _print_report(told)
    say(f"{told['texts_per_second']:,.0f} texts/s; {told['out_of_scope_share']:.1%} called out of scope")


@app.command()
def rollback(
    name: NameArgument,
    version: Annotated[
        int | None, typer.Option("--version", help="Which one is to serve; empty: the one before.")
    ] = None,
    url: UrlOption = None,
    key: KeyOption = None,
    config_path: ConfigOption = None,
) -> None:
    """Let an earlier version serve again. No version is lost."""
    body = {} if version is None else {"version": version}
    told = _Node(url, key, config_path).ask("POST", f"{_one(name)}/rollback", body)
    say(f"classifier/{name} now serves version {told['serving']} of {', '.join(map(str, told['versions']))}")


@app.command()
def remove(name: NameArgument, url: UrlOption = None, key: KeyOption = None, config_path: ConfigOption = None) -> None:
    """Delete a classifier with all its versions."""
    _Node(url, key, config_path).ask("DELETE", _one(name))
    say(f"classifier/{name} is removed")


@app.command()
def learn(name: NameArgument, url: UrlOption = None, key: KeyOption = None, config_path: ConfigOption = None) -> None:
    """Train a candidate on what traffic has taught; it serves once it is found better."""
    told = _Node(url, key, config_path).ask("POST", f"{_one(name)}/learn", {})
    say(f"classifier/{name}: {told['news'][0]}")


@app.command()
def forget(
    owner: Annotated[str, typer.Argument(metavar="KEY", help="Name of the key whose texts are removed.")],
    classifier: Annotated[str | None, typer.Option(help="Of one classifier alone.")] = None,
    url: UrlOption = None,
    key: KeyOption = None,
    config_path: ConfigOption = None,
) -> None:
    """Remove the labels and texts kept of a key's requests. Versions that were trained on them stay."""
    query = f"?key={quote(owner, safe='')}"
    if classifier is not None:
        target = f"classifier/{classifier.removeprefix('classifier/')}"
        query += f"&classifier={quote(target, safe='')}"
    told = _Node(url, key, config_path).ask("DELETE", f"/v1/examples{query}")
    say(f"{told['removed']} labelled texts of key {told['key']} are removed")


def _one(name: str) -> str:
    return f"{_PATH}/{quote(name, safe='')}"


def _url(config_path: Path | None) -> str:
    server = guarded(lambda: load_config(config_path)).server
    host = "127.0.0.1" if server.host in ("0.0.0.0", "::") else server.host
    return f"http://{f'[{host}]' if ':' in host else host}:{server.port}"


def _examples(path: Path, encoding: str) -> dict[str, Any]:
    """The file as the node takes it. What no node could read is said here, with its line."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror}")
    for number, line in enumerate(raw.splitlines(), 1):
        if len(line) > _LONGEST_LINE_BYTES:
            fail(f"{path}:{number} has {len(line)} bytes: a line is one example, so is this the right file?")
    try:
        text = raw.decode("utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding)
    except LookupError:
        fail(f"--encoding {encoding!r} is not known: try utf-8 or latin-1")
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        fail(f"{path}:{number} is not {encoding} (byte {raw[error.start]:#04x}): give --encoding, for example latin-1")
    return {"examples": text, "format": "csv" if path.suffix.lower() in (".csv", ".tsv") else "jsonl"}


def _follow(node: _Node, name: str) -> Mapping[str, Any]:
    """Show the training until it has ended."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("starting", total=1.0)
        said = ""
        while True:
            run = node.ask("GET", f"{_one(name)}/training")
            progress.update(task, description=run["step"], completed=run["share"])
            if not stderr.is_terminal and run["step"] != said:
                said = run["step"]
                stderr.print(said)
            if run["state"] != "running":
                return run
            time.sleep(_POLL_SECONDS)


def _print(told: Mapping[str, Any]) -> None:
    report = told["report"]
    versions = ", ".join(map(str, told["versions"]))
    say(f"classifier/{told['name']}, version {told['version']} (version {told['serving']} of {versions} serves):")
    say(f"{len(told['labels'])} labels, {report['examples']} examples, features: {report['recipe']}")
    for row in report["tried"]:
        say(f"  tried {row['recipe']}: accuracy {row['accuracy']:.3f} in {row['seconds']:.1f} s")
    if report.get("asked_share"):
        say(f"  the encoder is asked about {report['asked_share']:.1%} of texts")
    _print_report(report)
    for note in report["notes"]:
        say(f"note: {note}")
    if told.get("traffic") is not None:
        print_traffic(told["traffic"], told.get("shadow"))


def _print_report(report: Mapping[str, Any]) -> None:
    say(
        f"accuracy {report['accuracy']:.3f}, macro F1 {report['macro_f1']:.3f}, ECE {report['ece']:.3f}, "
        f"Brier {report['brier']:.3f}"
    )
    table = Table("wrong answers at most", "answered here", "from confidence", box=None, pad_edge=False)
    for row in report["bounds"]:
        threshold = "no threshold keeps it" if row["threshold"] is None else f"{row['threshold']:.3f}"
        table.add_row(f"{row['bound']:.0%}", f"{row['local_share']:.1%}", threshold)
    stdout.print(table)
    worst = sorted((row for row in report["per_class"] if row["examples"]), key=lambda row: row["f1"])[:_SHOWN_CLASSES]
    classes = Table("weakest labels", "precision", "recall", "F1", "examples", box=None, pad_edge=False)
    for row in worst:
        figures = (f"{row[name]:.2f}" for name in ("precision", "recall", "f1"))
        classes.add_row(row["label"], *figures, str(row["examples"]))
    stdout.print(classes)
