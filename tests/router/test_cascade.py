"""A route's cascade: every text goes as far as it needs, and no further than it may."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from appliance.config import CascadeRule
from appliance.core import ONSITE, Request
from appliance.tasks.classify.cascade import CascadeCall, CascadeText, CascadeThresholds
from appliance.tasks.decisions import openai_shape, systemone
from tests.router.scene import Scene, engine_target, hosted_target, request_of
from tests.standin import StandIn

pytestmark = pytest.mark.anyio

POLICY = """
[[routes]]
name = "intents"
targets = ["classifier/mail", "onsite", "hosted"]
cascade = { bound = 0.05, audit_rate = 0.0, below_confidence = 0.6 MORE }
"""
CHOICE = {"type": "choice", "instructions": "Which?", "choices": [{"value": "a"}, {"value": "b"}]}


@dataclass
class Known:
    """What is known of the classifier's answers, and what was told of its texts."""

    threshold: float | None = 0.8
    told: list[CascadeCall] = field(default_factory=list)

    def get_thresholds(self, cascade: CascadeRule, classifier: str, version: str | None) -> CascadeThresholds:
        return CascadeThresholds(self.threshold, f"version {version} stands from {self.threshold}")

    def record_cascade(self, call: CascadeCall) -> None:
        self.told.append(call)

    @property
    def rows(self) -> Sequence[CascadeText]:
        return self.told[-1].rows


class Cascading(Scene):
    """A classifier and a small model on one engine, and a provider. A text says how sure each of them is of it:
    `9 7 x`: the classifier 0.9, the model 0.7. `?` is out of the classifier's scope."""

    def __init__(self, engine: StandIn, provider: StandIn) -> None:
        self.engine, self.provider = engine, provider
        self.known = Known()
        self.classified: list[int] = []
        self.asked_model: list[str] = []
        self.asked_provider: list[str] = []
        self.classifier_fails = False
        engine.reply, provider.reply = self._of_engine, self._of_provider
        decides = frozenset({"decisions"})
        super().__init__(
            engine_target(
                engine.address, "classifier/mail", abilities=frozenset({"classify", "decisions"}), context_tokens=None
            ),
            engine_target(engine.address, "onsite/tiny", abilities=decides | {"chat"}),
            hosted_target(provider.address, abilities=decides),
            policy=POLICY.replace("MORE", ""),
            feedback=self.known,
        )

    def policy(self, more: str) -> None:
        self.reload(POLICY.replace("MORE", more))

    def _of_engine(self, path: str, body: Mapping[str, Any]) -> Any:
        if path != "/classify":
            self.asked_model.append(body["input"])
            return {"answers": [_answer("b", int(body["input"].split()[1]) / 10)]}
        texts = body["texts"]
        self.classified.append(len(texts))
        if self.classifier_fails:
            return {"labels": ["a"]}
        sure = [0.6 if text.startswith("?") else int(text.split()[0]) / 10 for text in texts]
        return {
            "model": "mail",
            "version": 3,
            "labels": ["a", "b"],
            "probabilities": [[share, 1 - share] for share in sure],
            "out_of_scope": [0.5 if text.startswith("?") else -0.5 for text in texts],
        }

    def _of_provider(self, path: str, body: Mapping[str, Any]) -> Any:
        self.asked_provider.append(body["input"])
        return {"answers": [_answer("b", 0.9)]}

    async def decide(self, *texts: str, **fields: Any) -> tuple[Any, list[Mapping[str, Any]]]:
        """The facts and an answer for each text, or what it failed with."""
        body = {"inputs": list(texts), "questions": [CHOICE]}
        asked, calls = openai_shape.read_decision_batch(body)
        many = await self.pipeline.answer_many(_request(asked, fields), calls, concurrency=4)
        rows = openai_shape.make_batch_payload(many.results, calls)["results"]
        assert [row["index"] for row in rows] == list(range(len(texts)))
        return many.metadata, [row["answers"][0] if "answers" in row else row["error"] for row in rows]


def _answer(value: str, share: float) -> dict[str, Any]:
    shares = [{"value": "a", "probability": 1 - share}, {"value": "b", "probability": share}]
    return {"type": "choice", "choice": value, "confidence": share, "probabilities": shares}


def _request(asked: Any, fields: Mapping[str, Any]) -> Request:
    given = {"endpoint": "decisions", "body": asked.body, "format": "labels", "needs": asked.needs}
    return request_of(asked.text, **{**given, **fields})


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Cascading]:
    async with StandIn(uds=str(tmp_path / "engine.sock")) as engine, StandIn() as provider:
        made = Cascading(engine, provider)
        yield made
        await made.aclose()
        made.check_nothing_is_held()


def by(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    return [answer["answered_by"] for answer in answers]


async def test_each_text_goes_as_far_as_it_needs_and_says_who_answered(scene: Cascading) -> None:
    metadata, answers = await scene.decide("9 9 x", "5 9 x", "5 5 x", "9 5 x")
    assert by(answers) == ["classifier/mail", "onsite/tiny", "cloud/big", "classifier/mail"]
    assert [answer["choice"] for answer in answers] == ["a", "b", "b", "a"]
    assert scene.classified == [4]
    assert (sorted(scene.asked_model), scene.asked_provider) == (["5 5 x", "5 9 x"], ["5 5 x"])
    assert (metadata.target, metadata.location) == ("classifier/mail, onsite/tiny, cloud/big", "hosted")
    assert metadata.reason == "cascade of 4 texts: 2 by classifier/mail, 1 by onsite/tiny, 1 by cloud/big"


async def test_of_256_texts_ten_unsure_ones_cost_ten_texts_at_the_model(scene: Cascading) -> None:
    texts = [f"{5 if number % 25 == 3 else 9} 9 x{number}" for number in range(250)]
    _, answers = await scene.decide(*texts)
    assert scene.classified == [250], "one call about all of them"
    assert len(scene.asked_model) == 10
    assert [place for place, name in enumerate(by(answers)) if name == "onsite/tiny"] == list(range(3, 250, 25))


async def test_a_bound_request_never_leaves_however_unsure_everybody_is(scene: Cascading) -> None:
    scene.policy(", until_known = 'escalate'")
    scene.known.threshold = None
    metadata, answers = await scene.decide("5 5 x", "? 9 x", residency=ONSITE)
    assert by(answers) == ["onsite/tiny"] * 2
    assert [answer.get("unsure", False) for answer in answers] == [True, False]
    assert [row.is_sure for row in scene.known.rows] == [False, True], "an unsure answer teaches nobody"
    assert metadata.location == "onsite"
    assert scene.provider.calls == 0
    assert scene.known.told[-1].residency == "onsite"


async def test_a_bound_text_is_audited_by_nobody_off_the_site(scene: Cascading) -> None:
    scene.reload(POLICY.replace("MORE", "").replace("audit_rate = 0.0", "audit_rate = 1.0"))
    await scene.decide("9 9 x", residency=ONSITE)
    assert scene.provider.calls == 0


async def test_a_text_out_of_scope_goes_on_however_sure_the_classifier_is(scene: Cascading) -> None:
    scene.known.threshold = 0.1
    _, answers = await scene.decide("? 9 x", "2 9 x")
    assert by(answers) == ["onsite/tiny", "classifier/mail"]
    assert [row.classifier_confidence for row in scene.known.rows] == [0.0, pytest.approx(0.8)]


async def test_where_too_few_labels_are_known_every_text_goes_on(scene: Cascading) -> None:
    scene.known.threshold = None
    _, answers = await scene.decide("9 9 x", "9 5 x")
    assert by(answers) == ["onsite/tiny", "cloud/big"]


async def test_or_those_below_a_fixed_confidence_where_the_policy_says_so(scene: Cascading) -> None:
    scene.policy(", until_known = 'below_confidence'")
    scene.known.threshold = None
    _, answers = await scene.decide("9 9 x", "5 9 x")
    assert by(answers) == ["classifier/mail", "onsite/tiny"]


async def test_beyond_the_rate_the_least_sure_go_and_the_others_stand_marked(scene: Cascading) -> None:
    scene.policy(", max_rate = 0.25")
    _, answers = await scene.decide("7 9 x", "6 9 x", "9 9 x", "9 9 y")
    assert by(answers) == ["classifier/mail", "onsite/tiny", "classifier/mail", "classifier/mail"]
    assert [answer.get("unsure", False) for answer in answers] == [True, False, False, False]
    assert [row.capped for row in scene.known.rows] == [True, False, False, False]
    ((code, route), text), *others = scene.alerts.items()
    assert (code, route, others) == ("escalation_capped", "intents", [])
    assert "outside the bound of 5%" in text
    await scene.decide(*["9 9 x"] * 40)
    assert not scene.alerts


async def test_an_unsure_answer_that_nobody_can_better_stands_and_says_so(scene: Cascading) -> None:
    scene.provider.mood = "server_error"
    _, answers = await scene.decide("5 5 x", "9 9 x")
    assert by(answers) == ["onsite/tiny", "classifier/mail"]
    assert [answer.get("unsure", False) for answer in answers] == [True, False]


@pytest.mark.parametrize("fails", [True, False])
async def test_without_its_classifier_a_cascade_asks_the_models(scene: Cascading, fails: bool) -> None:
    if fails:
        scene.classifier_fails = True
    else:
        scene.targets = scene.targets[1:]
        scene.publish()
    _, answers = await scene.decide("9 9 x", "9 5 x")
    assert by(answers) == ["onsite/tiny", "cloud/big"]
    assert [row.own for row in scene.known.rows] == [None, None]
    assert [row.went_on for row in scene.known.rows] == [True, True]


async def test_a_question_with_other_choices_than_the_labels_is_not_the_classifiers(scene: Cascading) -> None:
    question = {**CHOICE, "choices": [{"value": "a"}, {"value": "b"}, {"value": "c"}]}
    asked, calls = openai_shape.read_decision_request({"input": "9 9 x", "questions": [question]})
    answer = await scene.pipeline.answer(_request(asked, {}), calls[0])
    assert answer.payload["answers"][0]["answered_by"] == "onsite/tiny"
    assert answer.metadata.reason == "fallback: classifier/mail unsupported_feature"


async def test_one_text_is_answered_in_its_own_wire_format(scene: Cascading) -> None:
    question = {"type": "choice", "instructions": "Which?", "criteria": {"a": None, "b": None}}
    asked, calls = systemone.read_systemone_request({"state": "5 9 x", "questions": {"q": question}})
    answer = await scene.pipeline.answer(_request(asked, {}), calls[0])
    assert answer.payload["answers"]["q"]["choice"] == "b"
    assert answer.payload["answers"]["q"]["answered_by"] == "onsite/tiny"
    assert answer.metadata.reason == "escalation: classifier/mail unsure of 1 of 1 texts (version 3 stands from 0.8)"
    rows = [(one.target, one.result, one.detail) for one in scene.ledger.outcomes[-1].attempts]
    assert rows == [("classifier/mail", "rejected", "unsure: every text went on"), ("onsite/tiny", "answered", "")]


async def test_the_ledger_has_every_attempt_of_a_batch(scene: Cascading) -> None:
    metadata, _ = await scene.decide("9 9 x", "5 9 x", "5 5 x")
    rows = {one.target: (one.result, one.detail) for one in scene.ledger.outcomes[-1].attempts}
    assert rows == {
        "classifier/mail": ("answered", "2 of 3 texts went on"),
        "onsite/tiny": ("answered", "1 of 2 texts went on"),
        "cloud/big": ("answered", ""),
    }
    hosted = [one.cost_usd or 0.0 for one in scene.ledger.outcomes[-1].attempts if one.location == "hosted"]
    assert metadata.cost_usd == pytest.approx(sum(one.cost_usd or 0.0 for one in scene.ledger.outcomes[-1].attempts))
    assert sum(hosted) > 0


async def test_an_audited_text_is_answered_by_the_last_step_however_sure_the_classifier_is(scene: Cascading) -> None:
    scene.reload(POLICY.replace("MORE", "").replace("audit_rate = 0.0", "audit_rate = 0.6"))
    _, answers = await scene.decide("9 9 x", "5 9 x")  # the scene's chance is always 0.5
    assert by(answers) == ["cloud/big"] * 2
    assert scene.asked_model == []
    assert [(row.audited, row.is_reference, row.own, row.answer) for row in scene.known.rows] == [
        (True, True, "a", "b"),
        (True, True, "a", "b"),
    ]


async def test_an_audit_that_fails_leaves_the_sure_answer_as_it_was(scene: Cascading) -> None:
    scene.reload(POLICY.replace("MORE", "").replace("audit_rate = 0.0", "audit_rate = 0.6"))
    scene.provider.mood = "server_error"
    _, (answer,) = await scene.decide("9 9 x")
    assert (answer["answered_by"], answer.get("unsure", False)) == ("classifier/mail", False)
    assert not scene.known.rows[0].audited


async def test_a_caller_who_names_a_model_is_not_sent_through_the_cascade(scene: Cascading) -> None:
    _, answers = await scene.decide("5 5 x", model="onsite/tiny")
    assert "answered_by" not in answers[0]
    assert scene.classified == []


async def test_texts_that_nobody_answers_are_errors_of_their_own(scene: Cascading) -> None:
    scene.classifier_fails = True
    scene.engine.mood = scene.provider.mood = "server_error"
    _, rows = await scene.decide("9 9 x", "9 5 x")
    assert [row["code"] for row in rows] == ["backend_error"] * 2
