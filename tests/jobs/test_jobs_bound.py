"""Lines that are asked together, under a policy that looks into them: what binds one binds no other, and it stays."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request as Http
from starlette.responses import Response

from appliance.core import Request, TaskCall
from appliance.errors import Unavailable
from appliance.jobs.lines.executor import LineExecutor
from appliance.jobs.models import BatchLine, BatchTerms
from tests.jobs.posted import HOSTED_FIRST, LOCAL_FIRST, PostOffice
from tests.providers.batches_api import BatchesApi
from tests.router.scene import engine_target, hosted_target

pytestmark = pytest.mark.anyio

HURRIED = HOSTED_FIRST.replace(
    "total_seconds = 20.0", "latency_budget_seconds = 1.0\nmax_wait_seconds = 1.0\ntotal_seconds = 2.0"
)
SEARCHED = '\n[residency]\ncontent = "personal_data"\n'
ADDRESS = "ada.lovelace@example.org"
TEXTS = ("the lamp is broken", f"write to {ADDRESS} at once", "where is my parcel", "I want my money back")
QUESTIONS = [{"type": "choice", "name": "topic", "instructions": "Which?", "choices": [{"value": "a"}, {"value": "b"}]}]


def lines() -> list[BatchLine]:
    bodies: Sequence[dict[str, Any]] = [{"model": "auto", "input": text, "questions": QUESTIONS} for text in TEXTS]
    return [BatchLine(number, 0, 0, f"c{number}", "/v1/decisions", body, b"") for number, body in enumerate(bodies, 1)]


TERMS = BatchTerms("batch_1", "k", "any", None, 1.0)


@dataclass
class Seen:
    """What the pipeline was asked, each with how many calls it was cut into."""

    texts: list[str] = field(default_factory=list)
    groups: list[tuple[str, int]] = field(default_factory=list)


def watched(lines_: LineExecutor, scene: Any) -> Seen:
    seen = Seen()

    async def answer(request: Request, call: TaskCall) -> Any:
        seen.texts.append(request.text)
        raise Unavailable("nobody is there")

    async def answer_many(request: Request, calls: Sequence[TaskCall], *, concurrency: int) -> Any:
        seen.groups.append((request.text, len(calls)))
        raise Unavailable("nobody is there")

    scene.pipeline.answer, scene.pipeline.answer_many = answer, answer_many
    return seen


async def test_a_line_with_personal_data_is_not_asked_in_one_call_with_others(tmp_path: Path) -> None:
    office = PostOffice(tmp_path, "http://127.0.0.1:9/v1", policy=LOCAL_FIRST + SEARCHED, engine=True)
    async with office.desk() as desk:
        lines_ = desk._deps.line_handler
        assert isinstance(lines_, LineExecutor)
        seen = watched(lines_, office.scene)
        answers = await lines_.execute(lines(), TERMS)
    assert len(answers) == 4
    ((together, calls),) = seen.groups
    assert calls == 1, "the others are one call of the engine"
    assert all((text in together) is (ADDRESS not in text) for text in TEXTS)
    (alone,) = seen.texts
    assert ADDRESS in alone


class Listening(BatchesApi):
    """Keeps all that reaches it, and answers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[bytes] = []

    async def _answer(self, request: Http) -> Response:
        self.heard.append(await request.body())
        await asyncio.sleep(0)
        return Response(json.dumps({"error": {"message": "not today"}}), 400, media_type="application/json")


async def test_a_line_with_personal_data_stays_where_the_others_of_its_group_leave(tmp_path: Path) -> None:
    async with Listening() as provider:
        office = PostOffice(tmp_path, provider.address, policy=HURRIED + SEARCHED, engine=True)
        async with office.desk() as desk:
            target = hosted_target(provider.address)
            office.scene.targets = (target, engine_target())
            office.scene.publish()
            answers = await desk._deps.line_handler.execute(lines(), TERMS)
        assert len(answers) == 4
        heard = b"\n".join(provider.heard).decode()
        assert all((text in heard) is (ADDRESS not in text) for text in TEXTS)
        assert ADDRESS not in heard
