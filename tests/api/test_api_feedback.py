"""What callers say of answers, over HTTP."""

import hashlib
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from appliance.api.auth import Authenticator
from appliance.api.endpoints.feedback import FeedbackEndpoints
from appliance.api.error_middleware import ErrorMiddleware
from appliance.api.intake import RequestIntake
from appliance.config import KeySettings
from appliance.errors import NotFound
from tests.api.stand_ins import StandInPipeline

pytestmark = pytest.mark.anyio


class Learning:
    """Knows one decision of the key `one`."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    async def add_feedback(
        self, owner: str, decision_id: str, index: int, label: str, *, sees_all: bool
    ) -> Mapping[str, Any]:
        if decision_id != "dec_1" or not (sees_all or owner == "one"):
            raise NotFound("not known here")
        self.said.append((owner, index, label))
        return {"decision_id": decision_id, "index": index, "classifier": "classifier/mail", "answered": "a"}

    async def add_example(
        self, owner: str, classifier: str, text: str, label: str, residency: str
    ) -> Mapping[str, Any]:
        self.said.append((owner, classifier, text, label, residency))
        return {"classifier": classifier}

    async def forget_owner(self, owner: str, classifier: str | None = None) -> int:
        self.said.append(("forget", owner, classifier))
        return 3

    async def describe_classifier(self, name: str) -> Mapping[str, Any] | None:
        return None

    async def start_training(self, name: str) -> Mapping[str, Any]:
        return {}

    async def forget_classifier(self, name: str) -> None: ...


def key(name: str, **more: Any) -> KeySettings:
    return KeySettings(name=name, sha256=hashlib.sha256(f"sk-{name}".encode()).hexdigest(), **more)


def client(learning: Learning | None) -> httpx.AsyncClient:
    keys = (key("one"), key("two"), key("bound", residency="onsite"), key("boss", scopes=("client", "admin")))
    pipeline = StandInPipeline()
    intake = RequestIntake(pipeline=lambda: pipeline, auth=Authenticator(keys, host="127.0.0.1"), max_body_bytes=1_000)
    feedback = FeedbackEndpoints(intake, learning)
    routes = [
        Route("/v1/feedback", feedback.add_feedback, methods=["POST"]),
        Route("/v1/examples", feedback.forget_examples, methods=["DELETE"]),
    ]
    app = Starlette(routes=routes)
    app.add_middleware(ErrorMiddleware)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x")


def as_key(name: str, **headers: str) -> dict[str, str]:
    return {"authorization": f"Bearer sk-{name}", **headers}


async def test_a_caller_says_what_was_right_for_one_text_of_its_decision() -> None:
    learning = Learning()
    async with client(learning) as http:
        said = await http.post(
            "/v1/feedback", json={"decision_id": "dec_1", "index": 4, "label": " b "}, headers=as_key("one")
        )
        assert (said.status_code, said.json()["answered"]) == (200, "a")
        body = {"decision_id": "dec_1", "label": "b"}
        assert (await http.post("/v1/feedback", json=body, headers=as_key("two"))).status_code == 404
        assert (await http.post("/v1/feedback", json=body, headers=as_key("boss"))).status_code == 200
        assert (await http.post("/v1/feedback", json=body)).status_code == 401
    assert learning.said == [("one", 4, "b"), ("boss", 0, "b")]


async def test_a_labelled_text_of_ones_own_carries_the_strictest_bound() -> None:
    learning = Learning()
    body = {"classifier": "classifier/mail", "input": " hello ", "label": "b"}
    async with client(learning) as http:
        await http.post("/v1/feedback", json=body, headers=as_key("bound", **{"x-appliance-residency": "any"}))
        await http.post("/v1/feedback", json=body, headers=as_key("one", **{"x-appliance-residency": "onsite"}))
    assert learning.said == [("bound", "classifier/mail", " hello ", "b", "onsite"),
                             ("one", "classifier/mail", " hello ", "b", "onsite")]  # fmt: skip


async def test_a_key_removes_its_own_texts_and_an_administrator_those_of_any() -> None:
    learning = Learning()
    async with client(learning) as http:
        assert (await http.delete("/v1/examples", headers=as_key("one"))).json() == {"key": "one", "removed": 3}
        assert (await http.delete("/v1/examples?key=one", headers=as_key("two"))).status_code == 403
        gone = await http.delete("/v1/examples?key=one&classifier=classifier/mail", headers=as_key("boss"))
        assert gone.status_code == 200
    assert learning.said == [("forget", "one", None), ("forget", "one", "classifier/mail")]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, "label is None"),
        ({"label": "b"}, "decision_id is None"),
        ({"label": " ", "decision_id": "dec_1"}, "label is ' '"),
        ({"label": "b" * 201, "decision_id": "dec_1"}, "at most 200"),
        ({"label": 4, "decision_id": "dec_1"}, "it must be a text"),
        ({"label": "b", "decision_id": 4}, "decision_id is 4"),
        ({"label": "b", "decision_id": "dec_1", "index": -1}, "index is -1"),
        ({"label": "b", "decision_id": "dec_1", "index": True}, "index is True"),
        ({"label": "b", "input": "hello"}, "classifier is None"),
        ({"label": "b", "input": "", "classifier": "classifier/mail"}, "input is ''"),
        ({"label": "b", "input": "x" * 20_001, "classifier": "classifier/mail"}, "at most 20000"),
    ],
)
async def test_what_is_wrong_with_feedback_is_named(body: Mapping[str, Any], told: str) -> None:
    async with client(Learning()) as http:
        refused = await http.post("/v1/feedback", json=body, headers=as_key("one"))
    assert refused.status_code == 400
    assert told in refused.json()["error"]["message"]


async def test_a_program_that_keeps_no_labels_says_so() -> None:
    async with client(None) as http:
        refused = await http.post("/v1/feedback", json={"decision_id": "dec_1", "label": "b"}, headers=as_key("one"))
    assert refused.status_code == 503
