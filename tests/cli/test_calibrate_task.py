"""appliance calibrate-task: a file of examples goes to the node, and its report comes back."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from typer.testing import CliRunner

from appliance.cli import app

QUALITY = {"accuracy": 0.5, "ece": 0.25, "brier": 0.5, "log_loss": 1.0}
REPORT = {
    "task": "mail",
    "target": "onsite/small",
    "variant": "q8_0",
    "questions": [
        {
            "name": "topic",
            "examples": 2,
            "temperature": 1.5,
            "bias": [{"value": "a", "bias": 0.5}],
            "before": QUALITY,
            "after": {**QUALITY, "ece": 0.125},
        }
    ],
    "usage": {},
}
QUESTIONS = [{"type": "predicate", "name": "topic", "instructions": "?"}]


class Node:
    """A stand-in that notes what it was sent."""

    def __init__(self) -> None:
        self.status, self.reply = 200, json.dumps(REPORT)
        self.bodies: list[Any] = []
        self.keys: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                outer.keys.append(self.headers["authorization"])
                content = outer.reply.encode()
                self.send_response(outer.status if self.path == "/v1/decisions/calibrate" else 404)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    thread = Thread(target=node.server.serve_forever, args=(0.01,))
    thread.start()
    yield node
    node.server.shutdown()
    thread.join()
    node.server.server_close()


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    examples, questions = tmp_path / "examples.jsonl", tmp_path / "questions.json"
    examples.write_text('{"text": "x", "label": true}\n\n{"input": "y", "label": false}\n')
    questions.write_text(json.dumps(QUESTIONS))
    return str(examples), str(questions)


def call(files: tuple[str, str], url: str, *more: str) -> Any:
    arguments = ["calibrate-task", files[0], "--task", "mail", "--questions", files[1], "--url", url, *more]
    return CliRunner().invoke(app, arguments)


def test_examples_and_method_go_to_the_node(files: tuple[str, str], node: Node) -> None:
    result = call(files, node.url, "--bias", "--content-free", "--model", "small", "--key", "sk-1")
    assert result.exit_code == 0, result.output
    (body,) = node.bodies
    assert [row["input"] for row in body["examples"]] == ["x", "y"]
    assert (body["questions"], body["task"], body["model"]) == (QUESTIONS, "mail", "small")
    assert (body["bias"], body["debias"], body["calibrate"]) == (True, False, "content_free")
    assert node.keys == ["Bearer sk-1"]
    assert "0.250" in result.stdout and "0.125" in result.stdout and "temperature 1.50" in result.stdout


def test_the_report_comes_as_json_where_that_is_asked(files: tuple[str, str], node: Node) -> None:
    assert json.loads(call(files, node.url, "--json").stdout) == REPORT


def test_what_the_node_refuses_is_told_in_its_words(files: tuple[str, str], node: Node) -> None:
    node.status, node.reply = 400, json.dumps({"error": {"message": "examples has 2 examples"}})
    result = call(files, node.url)
    assert result.exit_code == 1 and "examples has 2 examples" in result.output


def test_a_node_that_is_not_there_or_is_none_is_said_to_be(files: tuple[str, str], node: Node) -> None:
    node.reply = "<html>"
    assert "did not answer as a node does" in call(files, node.url).output
    assert "did not answer as a node does" in call(files, "http://127.0.0.1:9").output


def test_files_are_refused_with_their_place(files: tuple[str, str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"input": "x"}\n{oops\n')
    assert f"{bad}:2" in call((str(bad), files[1]), "http://127.0.0.1:9").output.replace("\n", "")
    bad.write_text("5\n")
    assert "is no object" in call((str(bad), files[1]), "http://127.0.0.1:9").output
    assert "cannot be read" in call((files[0], str(tmp_path / "none")), "http://127.0.0.1:9").output.replace("\n", "")
    bad.write_text("{}")
    assert "no list of questions" in call((files[0], str(bad)), "http://127.0.0.1:9").output.replace("\n", "")
