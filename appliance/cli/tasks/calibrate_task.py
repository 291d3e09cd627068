"""appliance calibrate-task: make the probabilities of a task's decisions true, from labelled examples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.table import Table

from appliance.cli.node_client import KEY_VARIABLE, NodeApiClient, UrlOption
from appliance.cli.options import ConfigOption, JsonOption
from appliance.cli.output import fail, say, say_json, stderr, stdout
from appliance.core.json_types import JsonObject, MutableJsonObject

_PATH = "/v1/decisions/calibrate"


def calibrate_task_command(
    examples_path: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON Lines: {input, label}, or {input, labels: {question: label}}.")
    ],
    task: Annotated[str, typer.Option(help="The name that requests will give in their field `task`.")],
    questions_path: Annotated[
        Path, typer.Option("--questions", help="JSON: the list of questions, as /v1/decisions takes them.")
    ],
    model: Annotated[str | None, typer.Option(help="Which model; empty: the one the policy chooses.")] = None,
    bias: Annotated[bool, typer.Option("--bias", help="Fit a bias for each option besides the temperature.")] = False,
    debias: Annotated[bool, typer.Option("--debias", help="Ask with the options in both orders.")] = False,
    content_free: Annotated[
        bool, typer.Option("--content-free", help="Take off what the model says to a text that says nothing.")
    ] = False,
    short: Annotated[bool, typer.Option("--short", help="Ask in the short layout, which saves tokens.")] = False,
    url: UrlOption = None,
    key: Annotated[str | None, typer.Option(help=f"An API key with the scope admin; empty: {KEY_VARIABLE}.")] = None,
    config_path: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit temperature and biases of a task on labelled examples, at the running node, which remembers them.

    Requests that name the task are answered with them. `after` is measured on examples that were not fitted on.
    """
    body: MutableJsonObject = {
        "task": task,
        "questions": _questions(questions_path),
        "examples": _examples(examples_path),
        "bias": bias,
        "debias": debias,
        "calibrate": "content_free" if content_free else "none",
        "layout": "short" if short else "chat",
    }
    if model is not None:
        body["model"] = model
    # No limit to the wait: thousands of examples take a small machine minutes.
    node = NodeApiClient(url, key, config_path, timeout_seconds=None)
    with stderr.status(f"asking {len(body['examples'])} examples"):
        report = node.post(_PATH, body)
    if as_json:
        say_json(report)
    else:
        _print(report)


def _questions(path: Path) -> Sequence[Any]:
    given = _parsed(_read(path), str(path))
    rows = given.get("questions") if isinstance(given, dict) else given
    if not isinstance(rows, list):
        fail(f"{path} holds no list of questions: write them as the field `questions` of /v1/decisions")
    return rows


def _examples(path: Path) -> Sequence[Any]:
    """The file's lines. `text` is taken for `input`, as many files name it."""
    rows = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if line.strip():
            row = _parsed(line, f"{path}:{number}")
            if not isinstance(row, dict):
                fail(f"{path}:{number} is no object: each line is {{input, label}}")
            rows.append({"input": row["text"], **row} if "text" in row else row)
    return rows


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror}")


def _parsed(text: bytes, place: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        fail(f"{place} is not valid JSON: {error}")


def _print(report: JsonObject) -> None:
    say(f"task {report['task']!r} on {report['target']}, variant {report['variant'] or 'unknown'}:")
    table = Table("question", "", "accuracy", "ECE", "Brier", "log loss", box=None, pad_edge=False)
    for row in report["questions"]:
        for when in ("before", "after"):
            told = row[when]
            figures = (f"{told[name]:.3f}" for name in ("accuracy", "ece", "brier", "log_loss"))
            table.add_row((row["name"] or "") if when == "before" else "", when, *figures)
    stdout.print(table)
    for row in report["questions"]:
        biases = ", ".join(f"{one['value']} {one['bias']:+.2f}" for one in row["bias"] or ())
        say(
            f"temperature {row['temperature']:.2f} from {row['examples']} examples"
            + (f"; bias {biases}" if biases else "")
        )
