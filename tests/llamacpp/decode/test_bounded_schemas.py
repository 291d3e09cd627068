"""Under a bounded schema even a model that never wants to end writes a valid object within its tokens."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.llamacpp.decode.constraints import GrammarCompiler
from appliance.llamacpp.model import LlamaModel
from appliance.tasks.extract.decode_schema import bound_schema
from appliance.tasks.extract.token_budget import limit_output_tokens
from appliance.wire.json_schema import check_value

OPEN: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "total": {"type": "number"},
        "count": {"type": ["integer", "null"]},
        "lines": {"type": "array", "items": {"type": "number", "minimum": 0}},
        "anything": {"description": "whatever was said"},
    },
    "required": ["name", "total", "count", "lines", "anything"],
}


@pytest.fixture(scope="module")
def served_model(smollm2_path: Path) -> Iterator[LlamaModel]:
    model = LlamaModel.load(smollm2_path, threads=1, context_tokens=512, sequences=1)
    yield model
    model.close()


def digits_first(piece: bytes) -> float:
    return 2.0 if piece.strip().isdigit() else 1.0 if piece == b"." else 0.0


def letters_first(piece: bytes) -> float:
    return 2.0 if piece.isalpha() else 1.0 if piece == b"," else 0.0


@pytest.mark.parametrize("wanted", [digits_first, letters_first])
def test_what_runs_away_is_ended_in_time(served_model: LlamaModel, wanted: Callable[[bytes], float]) -> None:
    model, bounded = served_model, bound_schema(OPEN)
    grammars = GrammarCompiler(model.vocab_pointer, model.end_tokens, vocabulary_size=model.vocabulary_size)
    wish = np.array([wanted(model.piece(token)) for token in range(model.vocabulary_size)], np.float32)
    constraint, text = grammars.compile(bounded), b""
    for _ in range(limit_output_tokens(bounded)):
        row = wish.copy()
        constraint.apply(row)
        token = int(np.argmax(row))
        if token in model.end_tokens:
            break
        constraint.accept(token)
        text += model.piece(token)
        if constraint.finished():
            break
    check_value(OPEN, json.loads(text))
    assert len(text) > 200, "it did run away"
