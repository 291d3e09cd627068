"""appliance classifiers: train them on labelled examples, look at how good they are, keep their versions."""

import time
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from appliance.cli.node_client import KEY_VARIABLE, NodeApiClient, UrlOption
from appliance.cli.options import ConfigOption, JsonOption
from appliance.cli.output import fail, say, say_json, stderr, stdout
from appliance.cli.tasks.cascade_traffic import print_traffic
from appliance.core.json_types import JsonObject, MutableJsonObject

_PATH = "/v1/classifiers"
_POLL_SECONDS = 0.3
_LONGEST_LINE_BYTES = 1_000_000
_SHOWN_CLASSES = 10

NameArgument = Annotated[str, typer.Argument(help="The classifier; requests name it as classifier/NAME.")]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="JSON Lines or CSV with text and label.")]
KeyOption = Annotated[str | None, typer.Option(help=f"An API key with the scope admin; empty: {KEY_VARIABLE}.")]
EncodingOption = Annotated[str, typer.Option(help="How the file is written, for example latin-1.")]
VersionOption = Annotated[int | None, typer.Option("--version", help="Which version; empty: the one that serves.")]


def train_command(
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
    node = _node(url, key, config_path)
    body: MutableJsonObject = {"name": name, **_examples(examples_path, encoding), "tier": tier}
    body["keep_examples"] = keep_examples
    body |= {field: value for field, value in (("accuracy", accuracy), ("encoder", encoder)) if value is not None}
    node.post(_PATH, body)
    try:
        run = _follow(node, name)
    except KeyboardInterrupt:
        node.delete(f"{_classifier_path(name)}/training")
        fail("cancelled; what served before still serves", code=130)
    if run["state"] != "done":
        fail(f"the training {run['state']}: {run['error'] or 'no reason was given'}")
    facts = node.get(_classifier_path(name))
    say_json(facts) if as_json else _print_classifier(facts)


def list_command(
    url: UrlOption = None, key: KeyOption = None, config_path: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """Every classifier of the node."""
    rows = _node(url, key, config_path).get(_PATH)["data"]
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


def show_command(
    name: NameArgument,
    version: VersionOption = None,
    url: UrlOption = None,
    key: KeyOption = None,
    config_path: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """How good a classifier is on examples that it was not fitted on."""
    query = "" if version is None else f"?version={version}"
    facts = _node(url, key, config_path).get(_classifier_path(name) + query)
    say_json(facts) if as_json else _print_classifier(facts)


def evaluate_command(
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
    facts = _node(url, key, config_path).post(f"{_classifier_path(name)}/evaluate", body)
    if as_json:
        say_json(facts)
        return
    say(f"classifier/{name}, version {facts['version']}, on {facts['rows']} examples:")
    _print_report(facts)
    say(f"{facts['texts_per_second']:,.0f} texts/s; {facts['out_of_scope_share']:.1%} called out of scope")


def rollback_command(
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
    facts = _node(url, key, config_path).post(f"{_classifier_path(name)}/rollback", body)
    say(f"classifier/{name} now serves version {facts['serving']} of {', '.join(map(str, facts['versions']))}")


def remove_command(
    name: NameArgument, url: UrlOption = None, key: KeyOption = None, config_path: ConfigOption = None
) -> None:
    """Delete a classifier with all its versions."""
    _node(url, key, config_path).delete(_classifier_path(name))
    say(f"classifier/{name} is removed")


def learn_command(
    name: NameArgument, url: UrlOption = None, key: KeyOption = None, config_path: ConfigOption = None
) -> None:
    """Train a candidate on what traffic has taught; it serves once it is found better."""
    facts = _node(url, key, config_path).post(f"{_classifier_path(name)}/learn", {})
    say(f"classifier/{name}: {facts['news'][0]}")


def forget_command(
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
    facts = _node(url, key, config_path).delete(f"/v1/examples{query}")
    say(f"{facts['removed']} labelled texts of key {facts['key']} are removed")


def _node(url: str | None, key: str | None, config_path: Path | None) -> NodeApiClient:
    """Without a limit to the wait: many examples take a small machine minutes."""
    return NodeApiClient(url, key, config_path, timeout_seconds=None)


def _classifier_path(name: str) -> str:
    return f"{_PATH}/{quote(name, safe='')}"


def _examples(path: Path, encoding: str) -> MutableJsonObject:
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


def _follow(node: NodeApiClient, name: str) -> JsonObject:
    """Show the training until it has ended."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("starting", total=1.0)
        said = ""
        while True:
            run = node.get(f"{_classifier_path(name)}/training")
            progress.update(task, description=run["step"], completed=run["share"])
            if not stderr.is_terminal and run["step"] != said:
                said = run["step"]
                stderr.print(said)
            if run["state"] != "running":
                return run
            time.sleep(_POLL_SECONDS)


def _print_classifier(facts: JsonObject) -> None:
    report = facts["report"]
    versions = ", ".join(map(str, facts["versions"]))
    say(f"classifier/{facts['name']}, version {facts['version']} (version {facts['serving']} of {versions} serves):")
    say(f"{len(facts['labels'])} labels, {report['examples']} examples, features: {report['recipe']}")
    for row in report["tried"]:
        say(f"  tried {row['recipe']}: accuracy {row['accuracy']:.3f} in {row['seconds']:.1f} s")
    if report.get("asked_share"):
        say(f"  the encoder is asked about {report['asked_share']:.1%} of texts")
    _print_report(report)
    for note in report["notes"]:
        say(f"note: {note}")
    if facts.get("traffic") is not None:
        print_traffic(facts["traffic"], facts.get("shadow"))


def _print_report(report: JsonObject) -> None:
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
