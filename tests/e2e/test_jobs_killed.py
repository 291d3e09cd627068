"""A node that is killed at any moment of a job goes on with it: no line is lost, none is answered twice."""

import asyncio
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.conftest import SMALL_ENGINE, home_with_model
from tests.running import RunningNode, running_node
from tests.standin import StandIn

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

QUESTIONS = [
    {
        "type": "choice",
        "name": "topic",
        "instructions": "What is it about?",
        "choices": [{"value": value} for value in ("billing", "delivery", "other")],
    }
]
LINES = 160
HOSTED_POLICY = """
[[routes]]
name = "all"
targets = ["hosted"]
"""


def provider(address: str) -> str:
    return f"""
[[providers]]
name = "standin"
base_url = "{address}"
models = [{{ name = "large", input_usd = 2.0, output_usd = 8.0 }}]
"""


def kill(node: RunningNode) -> None:
    """The node and its engines, as a power cut would; nothing of it cleans up."""
    engines = node.engine_pids()
    node.process.kill()
    node.process.wait()
    for pid in engines:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def client_of(node: RunningNode) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0)


def decision(number: int) -> dict[str, Any]:
    body = {"model": "auto", "input": f"The parcel {number} was charged twice", "questions": QUESTIONS}
    return {"custom_id": f"c{number}", "method": "POST", "url": "/v1/decisions", "body": body}


def chat(number: int) -> dict[str, Any]:
    body = {"model": "auto", "messages": [{"role": "user", "content": f"question {number}"}], "max_tokens": 5}
    return {"custom_id": f"c{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def start(client: openai.OpenAI, rows: list[dict[str, Any]]) -> str:
    data = "\n".join(json.dumps(row) for row in rows).encode()
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    made = client.batches.create(input_file_id=file.id, endpoint=rows[0]["url"], completion_window="24h")
    return made.id


def wait(client: openai.OpenAI, batch_id: str, lines: int | None = None, seconds: float = 100.0) -> openai.types.Batch:
    """Until so many lines are done, or the batch has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        batch = client.batches.retrieve(batch_id)
        assert batch.request_counts is not None
        done = batch.request_counts.completed + batch.request_counts.failed
        if batch.status in ("completed", "failed", "expired") or (lines is not None and done >= lines):
            return batch
        time.sleep(0.02)
    raise AssertionError(f"not in time: {batch}")


def check_whole(client: openai.OpenAI, batch: openai.types.Batch, lines: int) -> None:
    assert batch.status == "completed", batch
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (lines, 0)
    found = [json.loads(row) for row in client.files.content(batch.output_file_id or "").text.splitlines()]
    assert sorted(row["custom_id"] for row in found) == sorted(f"c{number}" for number in range(lines))
    assert batch.error_file_id is None


def test_a_job_survives_being_killed_again_and_again(smollm2_path: Path, tmp_path: Path) -> None:
    home = home_with_model(tmp_path / "node", smollm2_path)
    with running_node(home, config=SMALL_ENGINE) as node, client_of(node) as client:
        batch_id = start(client, [decision(number) for number in range(LINES)])
        kill(node)  # while it is validated, or hardly begun
    chance = random.Random(7)
    for share in (0.0, 0.25, 0.6):
        with running_node(home, config=SMALL_ENGINE) as node, client_of(node) as client:
            batch = wait(client, batch_id, lines=int(LINES * share))
            if batch.status == "completed":
                break
            time.sleep(chance.random() * 0.5)
            kill(node)
    with running_node(home, config=SMALL_ENGINE) as node, client_of(node) as client:
        check_whole(client, wait(client, batch_id), LINES)
        assert not list((home / "jobs" / "work").iterdir())


async def test_hosted_lines_that_are_sent_again_say_that_they_are_the_same(smollm2_path: Path, tmp_path: Path) -> None:
    home = home_with_model(tmp_path / "node", smollm2_path)
    async with StandIn(seconds_per_token=0.02) as cloud:
        config = SMALL_ENGINE + provider(cloud.address)

        def killed_twice() -> None:
            with running_node(home, config=config, policy=HOSTED_POLICY) as node, client_of(node) as client:
                batch_id = start(client, [chat(number) for number in range(LINES)])
                wait(client, batch_id, lines=20)
                kill(node)
            with running_node(home, config=config, policy=HOSTED_POLICY) as node, client_of(node) as client:
                wait(client, batch_id, lines=90)
                kill(node)
            with running_node(home, config=config, policy=HOSTED_POLICY) as node, client_of(node) as client:
                check_whole(client, wait(client, batch_id), LINES)

        await asyncio.to_thread(killed_twice)
        keys = [headers["idempotency-key"] for headers in cloud.headers]
        questions = [body["messages"][0]["content"] for body in cloud.bodies]
    assert len(set(questions)) == LINES
    # Whatever was sent again had the same key as before: such a provider bills it once.
    assert len(set(zip(keys, questions, strict=True))) == len(set(keys)) == LINES
    assert len(keys) - LINES <= 2 * 100  # what was under way, or not committed yet, at two kills
