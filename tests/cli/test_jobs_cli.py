"""appliance jobs at a node that is a stand-in."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner

from appliance.cli import app

TOLD = {
    "state": "running",
    "reason": "",
    "onsite": 40,
    "hosted": 2,
    "copied": 3,
    "lines_per_second": 4.5,
    "eta_seconds": 3723.0,
    "eta_at": 1_800_003_723,
}


def batch(status: str, completed: int, **more: Any) -> dict[str, Any]:
    return {
        "id": "batch_1",
        "endpoint": "/v1/decisions",
        "status": status,
        "created_at": 1_800_000_000,
        "request_counts": {"total": 50, "completed": completed, "failed": 1},
        "output_file_id": "file-out" if status == "completed" else None,
        "error_file_id": None,
        "errors": {"data": [{"line": 7, "message": "the line is not valid JSON"}]},
        "appliance": {**TOLD, **more},
    }


class Node(HTTPServer):
    """Answers with one payload after the other; the last one stays."""

    def __init__(self, answers: list[tuple[int, Any]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked = answers, list[tuple[str, str, str | None]]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Node

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path, self.headers.get("authorization")))
        answers = self.server.answers
        status, payload = answers.pop(0) if len(answers) > 1 else answers[0]
        data = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def node() -> Iterator[Node]:
    with Node([]) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield served
        finally:
            served.shutdown()
            thread.join()


def run(node: Node, *words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["jobs", *words, "--url", node.url, "--key", "secret"])
    return done.exit_code, done.output


def test_list_shows_how_far_and_how_fast(node: Node) -> None:
    node.answers = [(200, {"data": [batch("in_progress", 41)]})]
    code, text = run(node, "list", "--json")
    assert code == 0
    assert json.loads(text)[0]["id"] == "batch_1"
    assert run(node, "list")[0] == 0
    assert node.asked[0] == ("GET", "/v1/batches?limit=20", "Bearer secret")


def test_watch_follows_to_the_end_and_says_what_came_of_it(node: Node) -> None:
    node.answers = [(200, batch("in_progress", 10)), (200, batch("in_progress", 41)), (200, batch("completed", 49))]
    code, text = run(node, "watch", "batch_1", "--every", "0.1")
    assert code == 0
    assert "49 of 50 lines answered (40 on-site, 2 hosted, 3 copied), 1 failed" in text
    assert "file-out" in text
    assert "line 7: the line is not valid JSON" in text
    assert len(node.asked) == 3


def test_watch_of_a_batch_that_was_not_completed_fails(node: Node) -> None:
    node.answers = [(200, batch("expired", 20))]
    assert run(node, "watch", "batch_1")[0] == 1


def test_cancel_says_what_the_batch_is_now(node: Node) -> None:
    node.answers = [(200, batch("cancelling", 20))]
    code, text = run(node, "cancel", "batch_1")
    assert (code, text.strip()) == (0, "batch_1 is cancelling")
    assert node.asked == [("POST", "/v1/batches/batch_1/cancel", "Bearer secret")]


def test_a_refusal_is_its_own_sentence(node: Node) -> None:
    node.answers = [(404, {"error": {"message": "there is no batch 'x'"}})]
    code, text = run(node, "cancel", "x")
    assert code == 1
    assert "there is no batch 'x'" in text


def test_no_node_is_said_with_the_remedy() -> None:
    done = CliRunner().invoke(app, ["jobs", "list", "--url", "http://127.0.0.1:9"])
    assert done.exit_code == 1
    assert "start it" in done.output
