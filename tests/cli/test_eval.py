"""appliance eval and appliance tasks at a real application over a pipeline that is a stand-in."""

import asyncio
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from appliance.cli import app
from appliance.core import UpstreamCall
from appliance.errors import BackendOverloaded
from tests.api.stand_ins import StandInPipeline, make_app, served
from tests.tasks.rows import chat_payload

ROWS = [{"text": f"{word} {n}", "label": word} for n in range(15) for word in ("goal", "card")]
RECEIPTS = [
    {"text": f"SHOP {n}\nTOTAL {n}.50", "fields": {"company": f"SHOP {n}", "total": f"{n}.50"}} for n in range(1, 9)
]


def answer(outgoing: UpstreamCall) -> Any:
    """Right, but for texts that end in 3."""
    if outgoing.path == "/chat/completions":
        lines = outgoing.body["messages"][-1]["content"].splitlines()
        found = {"company": lines[0], "date": "", "address": "", "total": lines[1].split()[1]}
        return chat_payload(json.dumps(found))
    results = []
    for item in outgoing.body["items"]:
        said = "goal" if ("goal" in item["content"]) != item["content"].endswith("3") else "card"
        labels = outgoing.body["label_sets"][item["labels"]]
        rows = [{"label": label, "logprob": math.log(0.8 if label == said else 0.2)} for label in labels]
        results.append({"labels": rows, "label_mass": 0.9})
    return {"results": results}


class Node:
    """The application in a thread, as commands meet it."""

    def __init__(self) -> None:
        self.pipeline = StandInPipeline(reply=answer)
        self.url = ""
        self._ready, self._end = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._ready.wait(20)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with served(make_app(self.pipeline)) as url:
            self.url = url
            self._ready.set()
            await self._end.wait()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(20)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.stop()


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments])


def test_models_are_told_side_by_side_with_their_intervals(node: Node, tmp_path: Path) -> None:
    data = written(tmp_path / "topics_test.jsonl", ROWS)
    out = tmp_path / "report.json"
    told = run("eval", data, "--node", node.url, "--model", "b", "--baseline", "a", "--out", str(out))
    assert told.exit_code == 0, told.output
    assert "topics_test: 30 of 30 rows" in told.stdout
    assert "b against a: +0.000 (+0.00 to +0.00), no difference shown" in told.stdout
    report = json.loads(out.read_text())
    assert list(report["models"]) == ["a", "b"]
    figures = report["models"]["a"]
    assert figures["accuracy"]["value"] == pytest.approx(26 / 30)
    assert figures["accuracy"]["low"] < 26 / 30 < figures["accuracy"]["high"]
    assert figures["cost_usd"] == 0.0 and figures["errors"] == 0 and figures["answers_per_second"] > 0


def test_examples_are_drawn_beside_the_dataset_and_are_never_asked(node: Node, tmp_path: Path) -> None:
    data = written(tmp_path / "topics_test.jsonl", ROWS)
    written(
        tmp_path / "topics_fewshot.jsonl",
        [*ROWS[:4], {"text": "red card", "label": "card"}, {"text": "own goal", "label": "goal"}],
    )
    told = run("eval", data, "--node", node.url, "--few-shot", "2", "--json", "--model", "shots")
    assert json.loads(told.stdout)["few_shot"] == 2, "those that are asked are left out"
    shown = [turn["content"] for turn in node.pipeline.sent[-1].body["messages"][1:]]
    assert sorted(shown) == ["Label: card", "Label: goal", "own goal", "red card"]


def test_extractions_are_told_field_by_field(node: Node, tmp_path: Path) -> None:
    data = written(tmp_path / "receipts.jsonl", RECEIPTS)
    told = run("eval", data, "--node", node.url, "--limit", "6", "--model", "auto")
    assert told.exit_code == 0, told.output
    assert "company 1.00, date 1.00, address 1.00, total 1.00" in told.stdout and "not in text" in told.stdout


def test_a_run_goes_on_with_the_answers_it_has(node: Node, tmp_path: Path) -> None:
    data, answers = written(tmp_path / "t.jsonl", ROWS), str(tmp_path / "answers.jsonl")
    first = run("eval", data, "--node", node.url, "--limit", "10", "--answers", answers, "--json", "--model", "kept")
    sent = len(node.pipeline.sent)
    again = run("eval", data, "--node", node.url, "--limit", "10", "--answers", answers, "--json", "--model", "kept")
    assert len(node.pipeline.sent) == sent, "nothing was asked twice"
    assert json.loads(first.stdout) == json.loads(again.stdout)


def test_a_node_that_refuses_everything_ends_with_an_error(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.quality.evaluation.client._TRIES", 1)
    node.pipeline.error = BackendOverloaded("full")
    try:
        told = run("eval", written(tmp_path / "t.jsonl", ROWS), "--node", node.url, "--model", "down")
    finally:
        node.pipeline.error = None
    assert told.exit_code == 1
    assert "30 rows without an answer count as wrong; most often: full" in told.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--node", "http://127.0.0.1:1"], "no node answers at http://127.0.0.1:1"),
        (["--node", "http://127.0.0.1:1", "--start"], "--start and --node are both given"),
        (["--task", "t", "--few-shot", "1"], "brings its own examples"),
        (["--few-shot", "1", "--limit", "500"], "no rows are left"),
        (["--adapter", "/nowhere.toml"], "nowhere.toml"),
    ],
)
def test_what_cannot_be_run_says_why(tmp_path: Path, arguments: list[str], words: str) -> None:
    told = run("eval", written(tmp_path / "t.jsonl", ROWS), *arguments)
    assert told.exit_code == 1 and words in told.stderr


def test_tasks_are_saved_shown_used_and_removed(node: Node, tmp_path: Path) -> None:
    definition = tmp_path / "topic.toml"
    definition.write_text(
        'description = "sports or billing"\n[[questions]]\ntype = "choice"\nname = "topic"\n'
        'instructions = "What?"\nchoices = [{ value = "goal" }, { value = "card" }]\n'
    )
    shots = written(tmp_path / "shots.jsonl", [{"text": "own goal", "label": "goal"}])
    saved = run("tasks", "save", "topic", str(definition), "--examples", shots, "--url", node.url)
    assert saved.stdout.endswith("saved decision topic, version 1\n"), saved.output
    assert "topic" in run("tasks", "list", "--url", node.url).stdout
    shown = run("tasks", "show", "topic", "--url", node.url).stdout
    assert json.loads(shown)["examples"] == [{"input": "own goal", "label": "goal"}]
    (tmp_path / "again.json").write_text(shown)
    assert "version 1" in run("tasks", "save", "topic", str(tmp_path / "again.json"), "--url", node.url).stdout
    data = written(tmp_path / "t.jsonl", ROWS)
    told = run("eval", data, "--node", node.url, "--task", "topic", "--json", "--model", "by-task")
    assert json.loads(told.stdout)["models"]["by-task"]["accuracy"]["value"] == pytest.approx(26 / 30)
    assert "removed topic\n" in run("tasks", "remove", "topic", "--url", node.url).stdout
    gone = run("tasks", "show", "topic", "--url", node.url)
    assert gone.exit_code == 1 and "has not been saved" in gone.stderr


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("x.json", b"{", "not valid JSON"),
        ("x.toml", b"a = ", "not valid TOML"),
        ("x.toml", b"a = '\xff'", "not valid TOML"),
        ("x.json", b"[]", "holds no object"),
        ("x.json", b'{"colour": 1, "questions": []}', "colour is not known"),
    ],
)
def test_a_definition_that_cannot_be_read_says_why(
    node: Node, tmp_path: Path, name: str, raw: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(raw)
    told = run("tasks", "save", "t", str(tmp_path / name), "--url", node.url)
    assert told.exit_code == 1 and words in told.stderr
