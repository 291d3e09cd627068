"""Runs of tokens that a schema leaves no choice about are computed in one step, and change nothing of the answer."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from appliance.llamacpp.decode.constraints import GrammarCompiler, JsonConstraint
from appliance.llamacpp.engine import LlamaEngine
from appliance.llamacpp.engine_protocol import Logits, Sampling, SequenceRequest, TokenEvent
from appliance.llamacpp.model import LlamaModel

pytestmark = pytest.mark.anyio

NAMES = ("customer_reference", "delivery_address", "invoice_number")
SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {name: {"type": "string", "maxLength": 8} for name in NAMES},
    "required": list(NAMES),
    "additionalProperties": False,
}


class Unhurried:
    """The same constraint without telling what it forces."""

    def __init__(self, inner: JsonConstraint) -> None:
        self._inner = inner

    def apply(self, logits: Logits) -> None:
        self._inner.apply(logits)

    def accept(self, token: int) -> None:
        self._inner.accept(token)

    def finished(self) -> bool:
        return self._inner.finished()


@pytest.fixture(scope="module")
def grammars(f32_model: LlamaModel) -> GrammarCompiler:
    return GrammarCompiler(f32_model.vocab_pointer, f32_model.end_tokens, vocabulary_size=f32_model.vocabulary_size)


async def answer(engine: LlamaEngine, constraint: Any, **more: Any) -> tuple[list[TokenEvent], int]:
    """The tokens of an answer, and how many steps they took."""
    prompt = engine.model.tokenize("An order as JSON:\n")
    before = engine.report_load().steps
    request = SequenceRequest(
        prompt, more.pop("max_tokens", 120), Sampling(temperature=0.0), constraint=constraint, **more
    )
    events = [event async for events in engine.submit(request) for event in events]
    return events, engine.report_load().steps - before


async def test_forced_runs_take_one_step_and_the_object_is_whole(exact: LlamaEngine, grammars: GrammarCompiler) -> None:
    events, steps = await answer(exact, grammars.compile(SCHEMA), logprobs=1)
    text = b"".join(exact.model.piece(event.token) for event in events).decode()
    assert set(json.loads(text)) == set(NAMES)
    assert steps <= len(events) - 6
    forced = [event for event in events if event.logprob == 0.0]
    assert len(forced) >= 6 and all(event.top == ((event.token, 0.0),) for event in forced)


@pytest.mark.slow
async def test_forced_runs_change_nothing_of_the_answer(exact: LlamaEngine, grammars: GrammarCompiler) -> None:
    # Under different salts: what one wrote is not guessed for the other.
    hurried, few = await answer(exact, grammars.compile(SCHEMA), logprobs=0, cache_salt="one")
    unhurried, many = await answer(exact, Unhurried(grammars.compile(SCHEMA)), logprobs=0, cache_salt="other")
    model = exact.model
    assert [model.piece(event.token) for event in hurried] == [model.piece(event.token) for event in unhurried]
    assert few < many
    for one, other in zip(hurried, unhurried, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=2e-3)


async def test_a_forced_run_stops_where_the_budget_ends(exact: LlamaEngine, grammars: GrammarCompiler) -> None:
    for budget in (1, 2, 3):
        events, _ = await answer(exact, grammars.compile(SCHEMA), max_tokens=budget)
        assert len(events) == budget


def test_a_schema_with_a_choice_forces_nothing(f32_model: LlamaModel, grammars: GrammarCompiler) -> None:
    constraint = grammars.compile({"type": "object", "properties": {"a": {"enum": ["long_word_one", "other"]}}})
    assert constraint.list_forced_tokens() == []
    only = grammars.compile({"const": {"a_long_key": 1}})
    text = b"".join(f32_model.piece(token) for token in only.list_forced_tokens())
    assert b'{"a_long_key":1}'.startswith(text) and len(text) > 8
