"""Unsure answers go to a better target, as often as the route allows, and carry their own provenance."""

import asyncio
import math
from typing import Any

import pytest

from appliance.config import EscalationRule
from appliance.core import ONSITE, TaskResult, UpstreamReply, Usage
from appliance.errors import ContextTooLong
from appliance.router.attempts.verify import find_doubt
from appliance.tasks.decisions.decision_results import DecisionResult
from appliance.tasks.decisions.openai_shape import read_decision_request
from appliance.tasks.decisions.questions import QuestionResult
from appliance.tasks.extract.extraction import Extracted
from appliance.tasks.reply_result import ReplyResult
from tests.router.scene import hosted_target
from tests.router.stage import Stage, attempts

pytestmark = pytest.mark.anyio

ROUTE = """
[[routes]]
name = "r"
targets = ["onsite"]
escalation = { below_confidence = 0.7, max_rate = RATE, to = ["hosted"] }
"""


def policy(rate: float = 1.0) -> str:
    return ROUTE.replace("RATE", str(rate))


def told(confidence: float, **fields: Any) -> dict[str, Any]:
    """A chat's payload whose tokens had this probability on average."""
    logprobs = {"content": [{"token": "a", "logprob": math.log(confidence)}] * 3}
    choice = {"message": {"role": "assistant", "content": "x"}, "logprobs": logprobs, "finish_reason": "stop"}
    return {"choices": [choice], **fields}


def answered(*answers: dict[str, Any]) -> TaskResult:
    """What a target's `/decisions` reply with these answers comes to; each choice and score has two options."""
    questions, given = [], []
    for answer in answers:
        kind = "predicate" if answer["type"] == "refusal" else answer["type"]
        row: dict[str, Any] = {"type": kind, "instructions": "Which?"}
        if kind != "predicate":
            key, field = ("value", "choices") if kind == "choice" else ("label", "levels")
            row[field] = [{key: "a"}, {key: "b"}]
            shares = [1 - answer["confidence"], answer["confidence"]]
            pairs = zip(row[field], shares, strict=True)
            answer = {**answer, "probabilities": [{**one, "probability": share} for one, share in pairs]}
        questions.append(row)
        given.append(answer)
    _, (call,) = read_decision_request({"input": "x", "questions": questions})
    return call.read(
        hosted_target(abilities=frozenset({"decisions"})), [UpstreamReply({"answers": given}, Usage(), 0.1, 0.2)]
    )


@pytest.fixture
def unsure(stage: Stage) -> Stage:
    """A route that escalates, an engine that is unsure and a provider that is sure of itself."""
    stage.reload(policy())
    stage.engine.reply = lambda path, body: told(0.4, by="engine")
    stage.provider.reply = lambda path, body: told(0.9, by="provider")
    return stage


# --- what confidence is


@pytest.mark.parametrize(
    ("result", "confidence"),
    [
        (ReplyResult(told(0.5)), 0.5),
        (ReplyResult({"choices": [{"message": {"content": "x"}}]}), None),
        (answered({"type": "choice", "confidence": 0.8}, {"type": "predicate", "probability": 0.35}), 0.65),
        (answered({"type": "predicate", "probability": 0.1}, {"type": "score", "confidence": 0.95}), 0.9),
        (answered({"type": "refusal"}), None),
        (Extracted({"a": 1}, {"/a": 0.6, "/b": 0.9}, "m", Usage()), 0.6),
        (Extracted({"a": 1}, None, "m", Usage()), None),
        (DecisionResult("m", ((QuestionResult((0.2, 0.8), 0.3),), (QuestionResult((0.6, 0.4), 0.9),)), Usage()), 0.6),
        (DecisionResult("m", (ContextTooLong("long"), (QuestionResult(None),)), Usage()), None),
        (ReplyResult([]), None),
        (ReplyResult("text"), None),
        (ReplyResult({"choices": [None, {"logprobs": {"content": ["odd", {"logprob": "odd"}]}}]}), None),
    ],
)
def test_the_confidence_of_an_answer_is_that_of_its_least_sure_part(
    result: TaskResult, confidence: float | None
) -> None:
    found = result.confidence
    assert found is None if confidence is None else found == pytest.approx(confidence)


def test_little_label_mass_makes_an_answer_unsure_where_the_route_says_so() -> None:
    judged = DecisionResult("m", ((QuestionResult((0.95, 0.05), 0.1),),), Usage())
    plain = EscalationRule(below_confidence=0.7, max_rate=1.0, to=("hosted",))
    strict = EscalationRule(below_confidence=0.7, below_label_mass=0.2, max_rate=1.0, to=("hosted",))
    told_by_target = answered({"type": "predicate", "probability": 0.4, "label_mass": 0.4})
    assert judged.label_mass == 0.1 and told_by_target.label_mass == 0.4
    assert find_doubt(judged, plain) is None
    assert find_doubt(judged, strict) == "label mass 0.10 is below 0.20"


# --- what happens then


async def test_pitfall_16_an_escalated_answer_is_the_better_targets_alone(unsure: Stage) -> None:
    answer = await unsure.ask()
    assert answer.payload["by"] == "provider"
    assert answer.payload["choices"] == told(0.9)["choices"], "no score of the first model"
    assert (answer.metadata.target, answer.metadata.location) == ("cloud/big", "hosted")
    assert answer.metadata.reason == "escalation: onsite/tiny confidence 0.40 is below 0.70"
    assert attempts(unsure) == [("onsite/tiny", "rejected"), ("cloud/big", "answered")]
    first, second = unsure.ledger.outcomes[0].attempts
    assert (first.cause, second.cause) == ("first", "escalation")
    assert first.is_unsure and not second.is_unsure
    assert first.detail == "unsure: confidence 0.40 is below 0.70"


async def test_pitfall_17_both_stages_of_an_escalation_are_on_the_bill(unsure: Stage) -> None:
    answer = await unsure.ask()
    first, second = unsure.ledger.outcomes[0].attempts
    assert first.cost_usd and second.cost_usd
    assert answer.metadata.cost_usd == pytest.approx(first.cost_usd + second.cost_usd)


async def test_a_sure_answer_stays(unsure: Stage) -> None:
    unsure.engine.reply = lambda path, body: told(0.8)
    assert (await unsure.ask()).metadata.target == "onsite/tiny"
    assert unsure.provider.calls == 0


async def test_an_answer_that_tells_no_confidence_is_not_escalated(unsure: Stage) -> None:
    unsure.engine.reply = None
    assert (await unsure.ask()).metadata.target == "onsite/tiny"
    assert unsure.provider.calls == 0


async def test_a_bound_answer_is_never_escalated_off_the_site(unsure: Stage) -> None:
    assert (await unsure.ask(residency=ONSITE)).metadata.target == "onsite/tiny"
    assert unsure.provider.calls == 0


async def test_an_unsure_answer_stands_where_nobody_better_answers(unsure: Stage) -> None:
    unsure.provider.mood = "server_error"
    answer = await unsure.ask()
    assert answer.payload["by"] == "engine" and answer.metadata.target == "onsite/tiny"
    assert attempts(unsure) == [("onsite/tiny", "answered"), ("cloud/big", "failed")]
    assert unsure.ledger.outcomes[0].attempts[0].detail.endswith("nobody better answered")


async def test_escalations_are_capped_by_their_share_and_an_alert_says_so(unsure: Stage) -> None:
    unsure.reload(policy(rate=0.25))
    places = [(await unsure.ask()).metadata.target for _ in range(12)]
    assert places.count("cloud/big") == 3, "a quarter of those that were judged"
    ((code, route), text), *others = unsure.alerts.items()
    assert (code, route, others) == ("escalation_capped", "r", []) and "more than 25%" in text
    assert "not escalated, the rate is used up" in unsure.ledger.outcomes[-2].attempts[0].detail
    unsure.engine.reply = lambda path, body: told(0.9)
    for _ in range(20):
        await unsure.ask()
    unsure.engine.reply = lambda path, body: told(0.1)
    await unsure.ask()
    assert not unsure.alerts, "with room again the alert is over"


async def test_an_escalation_counts_as_an_attempt_of_the_one_budget(unsure: Stage) -> None:
    unsure.reload("[defaults]\nmax_attempts = 1\n" + policy())
    assert (await unsure.ask()).metadata.target == "onsite/tiny"
    assert unsure.provider.calls == 0


async def test_a_reload_does_not_reset_the_share(unsure: Stage) -> None:
    unsure.reload(policy(rate=0.5))
    for _ in range(4):
        await unsure.ask()
    unsure.reload(policy(rate=0.5))
    before = unsure.provider.calls
    await unsure.ask()
    assert (before, unsure.provider.calls) == (2, 2)


async def test_many_answers_at_once_stay_below_the_cap(unsure: Stage) -> None:
    unsure.reload(policy(rate=0.2))
    await asyncio.gather(*(unsure.ask() for _ in range(30)))
    assert unsure.provider.calls <= 6
