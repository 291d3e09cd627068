"""Extraction: `POST /v1/extract` turns texts into objects that match a JSON schema.

Request: `text` (one) or `texts` (1 to 1,000), `schema` (a JSON schema of type object), and optionally `instructions`,
`examples` (1 to 50 {text, object}, shown to the model before the text), `model`, `max_tokens` (for each object; sized
from the schema otherwise), `chunk_tokens` (128 to 1,000,000; 2,048 otherwise: longer texts are cut into overlapping
pieces of about that size, and what the pieces give is put together).
Response for `text`: {model, object, confidence, usage}. For `texts`: {model, results, usage}, results in order, each
{index, object, confidence} or {index, error} with OpenAI's error object.
`confidence` maps a JSON pointer to each leaf of the object to a probability (what it means: confidence.py), and is null
where the target gives no token probabilities. `usage` is that of a chat completion, summed. An object out of several
pieces has `evidence` besides: JSON pointer of a property or a list's item -> {start, end}, the characters of the piece
it was taken from. `cut`, where it is there, lists the strings that reached the length at which on-site engines end
those that the schema leaves unbounded (see decoding.py); give them a maxLength. `evidence: true` and `normalise`, or
`x-normalise` in the schema, ask for more: told.py says what comes back, forms/hints.py what may be asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from appliance.core import ParsedRequest, Target, UpstreamCall, UpstreamReply, Usage
from appliance.core.json_types import JsonObject, JsonSchema, MutableJsonObject
from appliance.errors import RejectedReply, RequestError
from appliance.tasks.decisions.confidence import measure_field_confidence
from appliance.tasks.extract import chunks, token_budget
from appliance.tasks.extract.annotations import Annotations, lower_confidence, read_annotations
from appliance.tasks.extract.decode_schema import MAX_STRING_CHARS, bound_schema
from appliance.tasks.extract.value_spans import iter_strings
from appliance.wire.chat_replies import check_choices, check_json_choice
from appliance.wire.json_schema import check_schema, check_value, is_strict_subset
from appliance.wire.strict_fields import (
    missing,
    read_int,
    read_list,
    read_model,
    read_object,
    read_text,
    refuse_other_contract,
    wrong,
)
from appliance.wire.usage import MESSAGE_TOKENS, estimate_tokens

MAX_TEXTS = 1_000
CHUNK_TOKENS = 2_048
"""What the smallest contexts in use hold together with an answer twice over; small models lose the thread beyond."""
MIN_CHUNK_TOKENS, MAX_CHUNK_TOKENS = 128, 1_000_000
MAX_EXAMPLES = 50

_ROLE = "You extract data from texts as JSON."
# The task comes after the text: SmolLM2-135M copies values then instead of inventing them (of 48 fields of receipts it
# had 9 right, and 1 with the task and the schema before the text).
_TASK = "Return a JSON object with these fields of the text above, each copied exactly as it is written there"


@dataclass(frozen=True, slots=True)
class Extracted:
    """A TaskResult of an extraction."""

    object: JsonObject
    confidences: Mapping[str, float] | None
    """By JSON pointer of each leaf."""
    model: str
    usage: Usage
    cut: tuple[str, ...] = ()
    """JSON pointers of strings that were ended at a length their schema does not name."""
    evidence: Mapping[str, chunks.Span] | None = None
    extra_fields: JsonObject = field(default_factory=dict)
    """Fields of the response besides."""

    @property
    def payload(self) -> JsonObject:
        return self.object

    @property
    def confidence(self) -> float | None:
        return min((self.confidences or {}).values(), default=None)

    @property
    def label_mass(self) -> float | None:
        return None


@dataclass(frozen=True, slots=True)
class ExtractCall:
    """One text, or a chunk of one. `read` returns Extracted, of which `make_extract_payload` makes the response.

    The object is written as a whole. Forking every field from the document and writing them side by side was measured
    on receipts with SmolLM2-135M: 10 took 62 s instead of 55 (two at once), and 5 of 40 fields were right instead of 8,
    for a field written alone does not see the ones before it.
    """

    text: str
    task: str
    schema: JsonSchema
    bounded: JsonSchema
    """What on-site engines decode under; see `decoding`."""
    output_tokens: int
    """To reckon with."""
    max_tokens: int
    """Where the answer is cut off."""
    index: int = 0
    """Of the text, among the request's."""
    span: chunks.Span = (0, 0)
    turns: Sequence[Mapping[str, str]] = ()
    """The examples, as messages that have been answered."""
    annotations: Annotations | None = None

    def streams(self, target: Target) -> bool:
        return False

    def verified_late(self) -> None:
        return None

    @property
    def prompt_tokens(self) -> int:
        shown = sum(estimate_tokens(turn["content"]) + MESSAGE_TOKENS for turn in self.turns)
        own = estimate_tokens(self.task) + estimate_tokens(self.text)
        return estimate_tokens(_ROLE) + shown + own + 2 * MESSAGE_TOKENS

    @property
    def piece(self) -> tuple[int, str]:
        """Where the text begins in the whole of which it may be a piece, and what it says."""
        return self.span[0], self.text

    def outgoing(self, target: Target) -> Sequence[UpstreamCall]:
        # Hosted APIs refuse `strict` for schemas with open objects or optional fields; on-site engines always enforce.
        onsite = target.location == "onsite"
        strict, schema = (True, self.bounded) if onsite else (is_strict_subset(self.schema), self.schema)
        body: MutableJsonObject = {
            "messages": [
                {"role": "system", "content": _ROLE},
                *self.turns,
                {"role": "user", "content": _asking(self.text, self.task)},
            ],
            "max_tokens": self.max_tokens,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "extraction", "strict": strict, "schema": schema},
            },
        }
        if "temperature" not in target.wire.refuses:
            body["temperature"] = 0
        if "logprobs" in target.abilities:
            body["logprobs"] = True
        return (UpstreamCall("/chat/completions", body),)

    def read(self, target: Target, replies: Sequence[UpstreamReply]) -> Extracted:
        """The object, validated. Raises BackendGarbage, or RejectedReply where it does not match the schema."""
        choice = check_choices(replies[0].payload, "message")[0]
        found = check_json_choice(choice, self.schema)
        if found is None:
            raise RejectedReply("the model refused to extract from this text")
        confidence = measure_field_confidence(str(choice["message"]["content"]), choice.get("logprobs"))
        if self.annotations is not None and self.annotations.evidence:
            confidence = lower_confidence(confidence, found, self.schema, self.piece)
        cut: tuple[str, ...] = ()
        if target.location == "onsite" and self.bounded != self.schema:
            cut = tuple(place for place, text in iter_strings(found) if len(text) == MAX_STRING_CHARS)
        return Extracted(found, confidence, target.model, replies[0].usage, cut)


def read_extract_request(body: JsonObject) -> tuple[ParsedRequest, Sequence[ExtractCall]]:
    """Check an extract body; one call for each text, or for each piece of one.

    Raises RequestError naming field, value and remedy.
    """
    texts = _read_texts(body)
    if body.get("schema") is None:
        raise missing("schema", 'it must be a JSON schema, such as {"type": "object", "properties": {...}}')
    wished = check_schema(body["schema"], "schema")
    if wished.get("type") != "object":
        raise wrong("schema.type", wished.get("type"), 'it must be "object": put other values into a property')
    annotations = read_annotations(body, wished)
    schema = annotations.asked
    given = read_int(body, "max_tokens", 1)
    chunk_tokens = read_int(body, "chunk_tokens", MIN_CHUNK_TOKENS, MAX_CHUNK_TOKENS) or CHUNK_TOKENS
    task, bounded = _task(schema, read_text(body, "instructions")), bound_schema(schema)
    likely = given or token_budget.estimate_output_tokens(schema)
    turns = _turns(body.get("examples"), schema, task)
    call = ExtractCall(
        "",
        task,
        schema,
        bounded,
        likely,
        given or token_budget.limit_output_tokens(bounded),
        turns=turns,
        annotations=annotations,
    )
    asked = ParsedRequest(
        endpoint="extract",
        model=read_model(body),
        body=body,
        text="\n".join((task, *texts)),
        format="json_schema",
        needs=frozenset({"chat", "json_schema"}),
        output_tokens=likely,
    )
    calls = [
        replace(call, text=text[start:stop], index=index, span=(start, stop))
        for index, text in enumerate(texts)
        for start, stop in chunks.split_spans(text, chunk_tokens)
    ]
    return asked, calls


def _asking(text: str, task: str) -> str:
    return f"{text}\n\n{task}"


def _turns(given: object, schema: JsonSchema, task: str) -> Sequence[Mapping[str, str]]:
    """Examples as turns: each text is asked about as the request's own, and answered with its object."""
    if given is None:
        return ()
    turns: list[Mapping[str, str]] = []
    for index, one in enumerate(read_list(given, "examples", 1, MAX_EXAMPLES, "examples")):
        path = f"examples[{index}]"
        row = read_object(one, path, "with text and object")
        for name in row:
            if name not in ("text", "object"):
                raise RequestError(f"{path}.{name} is not known: an example has text and object", param=path)
        text = _read_one(row.get("text"), f"{path}.text")
        found = read_object(row.get("object"), f"{path}.object", "as the schema has it, with values as in the text")
        try:
            check_value(schema, found)
        except RejectedReply as error:
            raise RequestError(f"{path}.object: {error.message}", param=f"{path}.object") from error
        turns.append({"role": "user", "content": _asking(text, task)})
        turns.append({"role": "assistant", "content": orjson.dumps(found).decode()})
    return turns


def _task(schema: JsonSchema, instructions: str | None) -> str:
    """What is asked after the text: names and descriptions where the fields are plain, else the schema itself."""
    rows = schema.get("properties") or {}
    if all(_is_plain(row) for row in rows.values()) and rows:
        names = [f"{name} ({row['description']})" if row.get("description") else name for name, row in rows.items()]
        asked = f"{_TASK}: {', '.join(names)}."
    else:
        asked = f"{_TASK}, following this JSON schema:\n{orjson.dumps(schema).decode()}"
    return "\n\n".join(filter(None, (asked, instructions)))


def _is_plain(row: Any) -> bool:
    """Whether a name and a description say all there is to say of a property."""
    kind = row.get("type") if isinstance(row, dict) else None
    return kind in ("string", "number", "integer", "boolean") and not row.keys() & {
        "enum",
        "const",
        "pattern",
        "format",
    }


def _read_texts(body: JsonObject) -> Sequence[str]:
    if "text" in body and "texts" in body:
        raise RequestError("text and texts are both given: send one of them", param="texts")
    if "texts" not in body:
        others = {"input": "/v1/decisions", "state": "/v1/systemone", "messages": "/v1/chat/completions"}
        refuse_other_contract(body, "/v1/extract", "text", others)
        return (_read_one(body["text"], "text"),)
    rows = read_list(body["texts"], "texts", 1, MAX_TEXTS, "texts")
    return [_read_one(row, f"texts[{index}]") for index, row in enumerate(rows)]


def _read_one(value: object, path: str) -> str:
    if not isinstance(value, str):
        raise wrong(path, value, "it must be a string")
    if not value.strip():
        raise RequestError(f"{path} is empty: give the text to extract from", param=path)
    return value
