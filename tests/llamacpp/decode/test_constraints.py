"""Masks let through what the schema allows, and bad schemas are refused with the reason."""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.errors import RequestError
from appliance.llamacpp.decode.constraints import JSON_OBJECT, ConstraintBroken, GrammarCompiler, JsonConstraint
from appliance.llamacpp.engine_protocol import Logits
from appliance.llamacpp.model import LlamaModel

RECEIPT: Mapping[str, Any] = {
    "type": "object",
    "properties": {"shop": {"type": "string", "maxLength": 20}, "total": {"type": "integer", "minimum": 0}},
    "required": ["shop", "total"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def served_model(smollm2_path: Path) -> Iterator[LlamaModel]:
    model = LlamaModel.load(smollm2_path, threads=1, context_tokens=512, sequences=1)
    yield model
    model.close()


@pytest.fixture(scope="module")
def grammars(served_model: LlamaModel) -> GrammarCompiler:
    return GrammarCompiler(
        served_model.vocab_pointer, served_model.end_tokens, vocabulary_size=served_model.vocabulary_size
    )


def logits(model: LlamaModel, seed: int = 0) -> Logits:
    return np.random.default_rng(seed).standard_normal(model.vocabulary_size, dtype=np.float32)


def decode(model: LlamaModel, constraint: JsonConstraint, seed: int, limit: int = 200) -> str:
    """A reply of a model that knows nothing: random logits, and the mask alone makes sense of them."""
    text = b""
    for step in range(limit):
        row = logits(model, seed * 1_000 + step)
        constraint.apply(row)
        token = int(np.argmax(row))
        if token in model.end_tokens:
            break
        constraint.accept(token)
        text += model.piece(token)
        if constraint.finished():
            break
    return text.decode()


def test_even_random_logits_give_an_object_of_the_schema(served_model: LlamaModel, grammars: GrammarCompiler) -> None:
    for seed in range(5):
        value = json.loads(decode(served_model, grammars.compile(RECEIPT), seed))
        assert set(value) == {"shop", "total"}
        assert isinstance(value["total"], int)


def test_the_mask_leaves_allowed_logits_as_they_were_and_forbids_all_others(
    served_model: LlamaModel, grammars: GrammarCompiler
) -> None:
    for schema in (RECEIPT, {"type": "string"}):
        constraint = grammars.compile(schema)
        for _ in range(2):
            row = logits(served_model)
            before = row.copy()
            constraint.apply(row)
            allowed = np.isfinite(row)
            assert 0 < allowed.sum() < row.size
            assert (row[allowed] == before[allowed]).all()
            constraint.accept(int(np.argmax(row)))


def test_objects_are_written_without_idle_whitespace(served_model: LlamaModel, grammars: GrammarCompiler) -> None:
    text = decode(served_model, grammars.compile({"const": {"a": [1, 2], "b": "x y"}}), 0)
    assert text == '{"a":[1,2],"b":"x y"}'


def test_a_schema_may_ask_for_whitespace_itself(served_model: LlamaModel, grammars: GrammarCompiler) -> None:
    constraint = grammars.compile({"type": "integer", "x-guidance": {"whitespace_flexible": True}})
    row = logits(served_model)
    constraint.apply(row)
    assert np.isfinite(row).any()


def test_json_object_means_an_object(served_model: LlamaModel, grammars: GrammarCompiler) -> None:
    constraint = grammars.compile(JSON_OBJECT)
    row = logits(served_model)
    constraint.apply(row)
    firsts = {served_model.piece(int(token))[:1] for token in np.flatnonzero(np.isfinite(row))}
    assert firsts == {b"{"}


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "wrong"}, "Invalid type: wrong"),
        ({"type": "object", "properties": 5}, "properties must be an object"),
        ({"$ref": "#/nope"}, "'/nope' does not exist"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength (5) is greater than maxLength (2)"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_with_the_reason(
    grammars: GrammarCompiler, schema: Mapping[str, Any], reason: str
) -> None:
    with pytest.raises(RequestError) as caught:
        grammars.compile(schema)
    assert reason in caught.value.message
    assert caught.value.param == "response_format"
    assert "<state>" not in caught.value.message


def test_a_token_outside_the_schema_is_an_error_and_not_a_silent_end(
    served_model: LlamaModel, grammars: GrammarCompiler
) -> None:
    constraint = grammars.compile(RECEIPT)
    with pytest.raises(ConstraintBroken):
        constraint.accept(served_model.tokenize("hello")[0])
    assert not constraint.finished()
    with pytest.raises(ConstraintBroken):
        constraint.apply(logits(served_model))


def test_sequences_of_one_schema_do_not_share_their_place(served_model: LlamaModel, grammars: GrammarCompiler) -> None:
    one, other = grammars.compile(RECEIPT), grammars.compile(RECEIPT)
    decode(served_model, one, 3)
    row = logits(served_model)
    other.apply(row)
    assert {served_model.piece(int(token))[:1] for token in np.flatnonzero(np.isfinite(row))} == {b"{"}


def test_the_memory_of_compiled_grammars_is_bounded_and_safe_between_threads(served_model: LlamaModel) -> None:
    grammars = GrammarCompiler(
        served_model.vocab_pointer,
        served_model.end_tokens,
        vocabulary_size=served_model.vocabulary_size,
        max_cached=2,
    )
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: grammars.compile({"const": n % 5}), range(40)))
    assert len(grammars._compiled) == 2
