"""Extraction: `POST /v1/extract` turns texts into objects that match a JSON schema.

Request: `text` (one) or `texts` (1 to 1,000), `schema` (a JSON schema of type object), and optionally `instructions`,
`model`, `max_tokens` (for each object; sized from the schema otherwise).
Response for `text`: {model, object, confidence, usage}. For `texts`: {model, results, usage}, results in order, each
{index, object, confidence} or {index, error} with OpenAI's error object.
`confidence` maps a JSON pointer to each leaf of the object to a probability (what it means: confidence.py), and is null
where the target gives no token probabilities. `usage` is that of a chat completion, summed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from appliance.core import Asked, Outgoing, Reply, Target, Usage
from appliance.errors import ApplianceError, RejectedReply, RequestError
from appliance.tasks import sizes
from appliance.tasks.confidence import field_confidence
from appliance.tasks.fields import missing, read_int, read_list, read_model, read_text, refuse_other_contract, wrong
from appliance.tasks.replies import check_json_choice, choices_of
from appliance.tasks.schemas import check_schema, is_strict_subset
from appliance.tasks.tokens import MESSAGE_TOKENS, estimate_tokens

MAX_TEXTS = 1_000

_TASK = (
    "Extract the fields of this JSON schema from the text that the user sends. Take every value from the text. "
    "Reply with the JSON object alone."
)


@dataclass(frozen=True, slots=True)
class Extracted:
    object: Mapping[str, Any]
    confidence: Mapping[str, float] | None
    model: str
    usage: Usage


@dataclass(frozen=True, slots=True)
class ExtractCall:
    """One text. `read` returns Extracted; `payload` and `texts_payload` make the response of it."""

    text: str
    system: str
    schema: Mapping[str, Any]
    output_tokens: int

    @property
    def stream(self) -> bool:
        return False

    @property
    def prompt_tokens(self) -> int:
        return estimate_tokens(self.system) + estimate_tokens(self.text) + 2 * MESSAGE_TOKENS

    def outgoing(self, target: Target) -> Sequence[Outgoing]:
        # Hosted APIs refuse `strict` for schemas with open objects or optional fields; on-site engines always enforce.
        strict = target.location == "onsite" or is_strict_subset(self.schema)
        body: dict[str, Any] = {
            "messages": [{"role": "system", "content": self.system}, {"role": "user", "content": self.text}],
            "temperature": 0,
            "max_tokens": self.output_tokens,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "extraction", "strict": strict, "schema": self.schema},
            },
        }
        if "logprobs" in target.abilities:
            body["logprobs"] = True
        return (Outgoing("/chat/completions", body),)

    def read(self, target: Target, replies: Sequence[Reply]) -> Extracted:
        """The object, validated. Raises BackendGarbage, or RejectedReply where it does not match the schema."""
        choice = choices_of(replies[0].payload, "message")[0]
        found = check_json_choice(choice, self.schema)
        if found is None:
            raise RejectedReply("the model refused to extract from this text")
        confidence = field_confidence(choice["message"]["content"], choice.get("logprobs"))
        return Extracted(found, confidence, target.model, replies[0].usage)


def read(body: Mapping[str, Any]) -> tuple[Asked, Sequence[ExtractCall]]:
    """Check an extract body. Raises RequestError naming field, value and remedy."""
    texts = _read_texts(body)
    if body.get("schema") is None:
        raise missing("schema", 'it must be a JSON schema, such as {"type": "object", "properties": {...}}')
    schema = check_schema(body["schema"], "schema")
    if schema.get("type") != "object":
        raise wrong("schema.type", schema.get("type"), 'it must be "object": put other values into a property')
    instructions = read_text(body, "instructions")
    output_tokens = read_int(body, "max_tokens", 1) or sizes.output_tokens(schema)
    system = "\n\n".join(filter(None, (_TASK, instructions, orjson.dumps(schema).decode())))
    asked = Asked(
        endpoint="extract",
        model=read_model(body),
        body=body,
        text="\n".join((system, *texts)),
        format="json_schema",
        needs=frozenset({"chat", "json_schema"}),
        output_tokens=output_tokens,
    )
    return asked, [ExtractCall(text, system, schema, output_tokens) for text in texts]


def _read_texts(body: Mapping[str, Any]) -> Sequence[str]:
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


def payload(extracted: Extracted) -> Mapping[str, Any]:
    """The response for one text."""
    return {
        "model": extracted.model,
        "object": extracted.object,
        "confidence": extracted.confidence,
        "usage": usage_object(extracted.usage),
    }


def texts_payload(results: Sequence[Extracted | ApplianceError]) -> Mapping[str, Any]:
    """The response for several texts, in order."""
    rows: list[Mapping[str, Any]] = []
    for index, result in enumerate(results):
        if isinstance(result, Extracted):
            rows.append({"index": index, "object": result.object, "confidence": result.confidence})
        else:
            rows.append({"index": index, **result.to_openai()})
    done = [result for result in results if isinstance(result, Extracted)]
    return {
        "model": ", ".join(dict.fromkeys(result.model for result in done)) or None,
        "results": rows,
        "usage": usage_object(sum((result.usage for result in done), Usage())),
    }


def usage_object(usage: Usage) -> Mapping[str, Any]:
    """Usage as a chat completion gives it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
