"""What a caller may send, checked field by field before anything else looks at it."""

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.errors import RequestError
from appliance.llamacpp.chat.message import MessageIn

MAX_LABEL_ITEMS = 10_000
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20

_NUL = re.compile("\0")
_SURROGATE = re.compile("[\ud800-\udfff]")

Envelope = TypeVar("Envelope", bound=BaseModel)
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Salt = Annotated[str, Field(max_length=512)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Stop = str | Annotated[list[str], Field(max_length=MAX_STOPS)]
TokenIds = list[int]


class _Strict(BaseModel):
    """Types are not guessed ("5" is no number); fields we do not know are ignored, as OpenAI's clients expect."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class JsonSchemaIn(_Strict):
    name: str = "schema"
    strict: bool | None = None
    json_schema: MutableJsonObject = Field(alias="schema")


class ResponseFormatIn(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaIn | None = None


class StreamOptionsIn(_Strict):
    include_usage: bool = False


class SampledIn(_Strict):
    """What chat and plain completions have in common."""

    model: str | None = None
    max_tokens: Count | None = None
    stop: Stop | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """0 and -1 both mean "off"."""
    min_p: Share | None = None
    seed: Seed | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    response_format: ResponseFormatIn | None = None
    stream: bool | None = None
    stream_options: StreamOptionsIn | None = None
    cache_salt: Salt | None = None
    prompt_cache_key: Salt | None = None
    priority: int = 0
    ignore_eos: bool = False


class ChatIn(SampledIn):
    messages: Annotated[list[MessageIn], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: list[MutableJsonObject] | None = None
    tool_choice: Literal["none", "auto", "required"] | MutableJsonObject | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: Annotated[MutableJsonObject, Field(max_length=16)] | None = None


class CompletionIn(SampledIn):
    prompt: str | list[str] | TokenIds | list[TokenIds]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None


class TokenizeIn(_Strict):
    content: str | None = None
    messages: Annotated[list[MessageIn], Field(min_length=1)] | None = None
    tools: list[MutableJsonObject] | None = None


class LabelItemIn(_Strict):
    """Exactly one of content, messages, prompt."""

    labels: str
    content: str | None = None
    messages: Annotated[list[MessageIn], Field(min_length=1)] | None = None
    prompt: str | None = None


class LabelsIn(_Strict):
    model: str | None = None
    messages: list[MessageIn] | None = None
    label_sets: Annotated[dict[str, list[str]], Field(min_length=1)]
    items: Annotated[list[LabelItemIn], Field(min_length=1, max_length=MAX_LABEL_ITEMS)]
    cue: str = ""
    open_turn: bool = False
    ending: bool = True
    tolerance: Annotated[float, Field(ge=0, le=0.1)] = 0.001
    priority: int = 0
    cache_salt: Salt | None = None
    prompt_cache_key: Salt | None = None


def parse_request(envelope: type[Envelope], body: bytes) -> Envelope:
    """The checked request. Raises RequestError naming field and value."""
    value = _json(body)
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, not {_shown(value)}")
    # A NUL can stand in valid JSON only as this escape, so bodies without it need no second look.
    if b"\\u0000" in body:
        _refuse_character(value, _NUL, "a NUL character (\\u0000)")
    try:
        return envelope.model_validate(value)
    except ValidationError as error:
        raise _refusal(error, value) from error


def _json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        reason = str(error)
        if "surrogate" in reason:
            _name_surrogate(body)
        raise RequestError(f"the body is not valid JSON: {reason}; send one JSON object in UTF-8") from error


def _name_surrogate(body: bytes) -> None:
    """Find the string with half a character, which orjson refuses without saying where it is."""
    try:
        value = json.loads(body)  # takes lone surrogates as they come
    except (ValueError, RecursionError):
        return
    _refuse_character(value, _SURROGATE, "a lone surrogate (half a character, \\ud800 to \\udfff)")


def _refuse_character(value: Any, wrong: re.Pattern[str], name: str, path: str = "") -> None:
    if isinstance(value, str):
        if wrong.search(value):
            raise RequestError(f"{path or 'the body'}: contains {name}; remove it", param=path or None)
    elif isinstance(value, dict):
        for key, inner in value.items():
            _refuse_character(key, wrong, name, f"{path}.*" if path else "*")
            _refuse_character(inner, wrong, name, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            _refuse_character(inner, wrong, name, f"{path}[{position}]")


def _refusal(error: ValidationError, body: JsonObject) -> RequestError:
    """The deepest error, in the caller's terms: where alternatives failed, the one that came closest says most."""
    placed = [(_path(problem["loc"], body), problem) for problem in error.errors(include_url=False)]
    deepest = max(len(path) for path, _ in placed)
    path, first = next((path, problem) for path, problem in placed if len(path) == deepest)
    reasons = dict.fromkeys(problem["msg"] for other, problem in placed if other == path)
    field = _written(path)
    given = "" if first["type"] == "missing" else f", got {_shown(first['input'])}"
    return RequestError(f"{field}: {' or '.join(reasons)}{given}", param=field)


def _path(loc: Sequence[int | str], body: Any) -> tuple[int | str, ...]:
    """pydantic's location without the names of types it tried, which are no part of what the caller sent."""
    path: list[int | str] = []
    value = body
    for step in loc:
        if isinstance(value, dict) and isinstance(step, str):
            path.append(step)
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            path.append(step)
            value = value[step]
    return tuple(path)


def _written(path: Sequence[int | str]) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
