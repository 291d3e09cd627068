"""Grammars of replies let every family's calls through, and nothing that is not a call of a tool on offer."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from appliance.core import ToolFormat
from appliance.errors import RequestError
from appliance.llamacpp.decode.constraints import ConstraintBroken, GrammarCompiler, JsonConstraint
from appliance.llamacpp.model import LlamaModel
from appliance.llamacpp.tools.formats import SYNTAXES
from appliance.llamacpp.tools.grammar import ReplyGrammarSpec
from appliance.llamacpp.tools.offered import check_offered_tools
from appliance.llamacpp.tools.parser import ReplySyntaxes
from tests.llamacpp.written_calls import SCHEMAS, TOOLS, TWO_CALLS, read

FORMATS = sorted(TWO_CALLS)
BOUNDED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["c", "f"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
        "hourly": {"type": "boolean"},
    },
    "required": ["unit", "hourly"],
    "additionalProperties": False,
}
PICK = {"type": "function", "function": {"name": "pick", "parameters": BOUNDED}}


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> Iterator[LlamaModel]:
    loaded = LlamaModel.load(smollm2_path, threads=1, context_tokens=512, sequences=1)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def grammars(model: LlamaModel) -> GrammarCompiler:
    return GrammarCompiler(model.vocab_pointer, model.end_tokens, vocabulary_size=model.vocabulary_size)


def rules(
    format: ToolFormat, tools: list[Any], choice: Any = None, parallel: bool | None = None, **more: Any
) -> ReplyGrammarSpec:
    return ReplyGrammarSpec(check_offered_tools(tools, choice, parallel), format, **more)


def write(model: LlamaModel, constraint: JsonConstraint, text: str) -> JsonConstraint:
    """`text`, token by token. Raises ConstraintBroken where it may not go on."""
    for token in model.tokenize(text, special=False):
        constraint.accept(token)
    return constraint


def may_end(model: LlamaModel, constraint: JsonConstraint) -> bool:
    if constraint.finished():
        return True
    row = np.zeros(model.vocabulary_size, np.float32)
    constraint.apply(row)
    return any(row[token] == 0 for token in model.end_tokens)


def babble(model: LlamaModel, constraint: JsonConstraint, seed: int, limit: int = 400) -> tuple[str, bool]:
    """What a model that knows nothing writes, and whether it came to an end."""
    random, text = np.random.default_rng(seed), b""
    for _ in range(limit):
        row = random.standard_normal(model.vocabulary_size, dtype=np.float32)
        constraint.apply(row)
        token = int(row.argmax())
        if token in model.end_tokens:
            return text.decode(), True
        constraint.accept(token)
        text += model.piece(token, special=True)
        if constraint.finished():
            return text.decode(), True
    return text.decode("utf-8", "replace"), False


# Pythonic booleans and channel ends that only a vocabulary with those tokens has are covered by babbling below.
@pytest.mark.parametrize("format", [one for one in FORMATS if one != "harmony"])
@pytest.mark.parametrize("choice", [None, "required"])
def test_what_the_family_writes_is_let_through(
    model: LlamaModel, grammars: GrammarCompiler, format: ToolFormat, choice: str | None
) -> None:
    constraint = grammars.compile_reply(rules(format, TOOLS, choice))
    assert may_end(model, write(model, constraint, TWO_CALLS[format]))


@pytest.mark.parametrize("format", [one for one in FORMATS if one != "harmony"])
def test_free_text_may_be_anything_and_end_anywhere(
    model: LlamaModel, grammars: GrammarCompiler, format: ToolFormat
) -> None:
    constraint = grammars.compile_reply(rules(format, TOOLS))
    assert may_end(model, write(model, constraint, "The answer is `{x}`, isn't it?\n\n- one [1]\n"))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_model_that_knows_nothing_still_makes_calls_that_fit(
    model: LlamaModel, grammars: GrammarCompiler, format: ToolFormat, seed: int
) -> None:
    constraint = grammars.compile_reply(rules(format, [PICK], "required", parallel=False))
    text, ended = babble(model, constraint, seed)
    if not ended:
        assert format == "harmony", text  # its analysis may go on for ever
        return
    message = read(text, ReplySyntaxes(tools=format, schemas={"pick": BOUNDED}))
    ((name, arguments),) = message.calls
    assert name == "pick"
    jsonschema.validate(json.loads(arguments), BOUNDED)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "other"',
        '<tool_call>\n{"name": "get_weather", "arguments": {"town"',
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": 7',
        '```json\n{"name": "get_weather", "arguments": {"town"',
    ],
)
def test_a_call_that_no_tool_allows_cannot_be_written(model: LlamaModel, grammars: GrammarCompiler, text: str) -> None:
    constraint = grammars.compile_reply(rules("hermes", TOOLS))
    with pytest.raises(ConstraintBroken):
        write(model, constraint, text)


def test_a_forced_call_leaves_no_room_for_words(model: LlamaModel, grammars: GrammarCompiler) -> None:
    with pytest.raises(ConstraintBroken):
        write(model, grammars.compile_reply(rules("hermes", TOOLS, "required")), "Sure")


def test_a_call_or_the_json_that_was_asked_for(model: LlamaModel, grammars: GrammarCompiler) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    for text in ('{"n": 5}', TWO_CALLS["hermes"]):
        constraint = grammars.compile_reply(rules("hermes", TOOLS, schema=schema))
        assert may_end(model, write(model, constraint, text))
    with pytest.raises(ConstraintBroken):
        write(model, grammars.compile_reply(rules("hermes", TOOLS, schema=schema)), "Well")


def test_thoughts_come_before_a_forced_call_and_before_json(model: LlamaModel, grammars: GrammarCompiler) -> None:
    thinking: dict[str, Any] = {"reasoning": "think", "thinking_open": True}
    forced = grammars.compile_reply(rules("hermes", TOOLS, "required", **thinking))
    assert may_end(model, write(model, forced, f"Hm.</think>\n\n{TWO_CALLS['hermes']}"))
    json_after = grammars.compile_reply(ReplyGrammarSpec(None, None, {"type": "object"}, "think", True))
    assert may_end(model, write(model, json_after, "Hm.</think>\n\n{}"))


def test_a_schema_that_cannot_be_enforced_costs_a_strict_tool_and_loosens_another(
    model: LlamaModel, grammars: GrammarCompiler
) -> None:
    odd = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}, "additionalProperties": False}
    loose = {"type": "function", "function": {"name": "odd", "parameters": odd}}
    constraint = grammars.compile_reply(rules("hermes", [loose], "required"))
    write(model, constraint, '<tool_call>\n{"name": "odd", "arguments": {"anything": 1}}\n</tool_call>')
    strict = {"type": "function", "function": {"name": "odd", "parameters": odd, "strict": True}}
    with pytest.raises(RequestError, match="parameters of odd") as caught:
        grammars.compile_reply(rules("hermes", [strict], "required"))
    assert caught.value.param == "tools"


def test_control_tokens_are_tokens_where_the_vocabulary_has_them(model: LlamaModel, grammars: GrammarCompiler) -> None:
    special = model.tokenize("<file_sep>")
    assert len(special) == 1
    marked = rules("lfm2", TOOLS, specials={"<|tool_call_start|>": special[0]})
    constraint = grammars.compile_reply(marked)
    write(model, constraint, "Let me look.")
    constraint.accept(special[0])
    with pytest.raises(ConstraintBroken):
        write(model, constraint, "words")


def test_every_format_has_a_marker_or_a_sign_that_opens_it() -> None:
    assert all(syntax.opening or syntax.bare for syntax in SYNTAXES.values())
    assert set(SCHEMAS) == {tool["function"]["name"] for tool in TOOLS}
