"""Responses of OpenAI's newer API and a chat's replies, each made of the other; what ends them."""

from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias, cast

from appliance.core import Usage
from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.errors import BackendGarbage
from appliance.wire.chat_fields import part_text
from appliance.wire.chat_ir import (
    CalledFunction,
    ChatChoice,
    ChatMessage,
    ChoiceLogprobs,
    FinishReason,
    TokenLogprob,
    ToolCall,
    reasoning_text,
)
from appliance.wire.chat_replies import check_choices, make_completion, reply_function
from appliance.wire.dialect import WireRequest
from appliance.wire.opaque_state import foreign_state, pack_state
from appliance.wire.usage import read_usage, write_responses_usage

Item: TypeAlias = MutableJsonObject

FINISH_REASONS: Final[Mapping[str, FinishReason]] = {
    "max_output_tokens": "length",
    "content_filter": "content_filter",
}
"""Why a response is incomplete -> a chat's finish reason; one that is complete ended by itself or in a call."""
INCOMPLETE_REASONS: Final[Mapping[str, str]] = {finish: reason for reason, finish in FINISH_REASONS.items()}


# A target's reply, read.


def read_responses_reply(request: WireRequest, payload: JsonObject) -> tuple[JsonObject, Usage]:
    """A whole response as a chat completion. Raises BackendGarbage."""
    output = payload.get("output")
    if not isinstance(output, list) or not all(isinstance(item, dict) for item in output):
        raise BackendGarbage(f"{request.target.name} answered without output")
    usage = read_usage(payload.get("usage")) or Usage()
    message, logprobs = _read_message(output)
    finish = read_finish_reason(payload, bool(message.get("tool_calls")))
    choice: ChatChoice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish}
    identity, model = str(payload.get("id") or ""), str(payload.get("model") or request.target.model)
    return make_completion(identity, model, [choice], usage, service_tier=payload.get("service_tier")), usage


def _read_message(output: Sequence[JsonObject]) -> tuple[ChatMessage, ChoiceLogprobs | None]:
    texts: list[str] = []
    refusals: list[str] = []
    thoughts: list[str] = []
    own: list[JsonObject] = []
    calls: list[ToolCall] = []
    scored: list[TokenLogprob] = []
    for item in output:
        match item.get("type"):
            case "message":
                for part in item.get("content") or ():
                    (texts if part.get("type") == "output_text" else refusals).append(part_text(part) or "")
                    scored += part.get("logprobs") or ()
            case "reasoning":
                own.append(read_reasoning(item))
                thoughts.append(_thought(item))
            case "function_call":
                calls.append(read_function_call(item))
    message: ChatMessage = {
        "role": "assistant",
        "content": "".join(texts) if texts else None,
        "refusal": "".join(refusals) or None,
    }
    if any(thoughts):
        message["reasoning_content"] = "\n".join(thoughts)
    if own:
        message["thinking_blocks"] = own
    if calls:
        message["tool_calls"] = calls
    return message, {"content": scored, "refusal": None} if scored else None


def read_function_call(item: JsonObject) -> ToolCall:
    function: CalledFunction = {"name": item["name"], "arguments": item.get("arguments") or ""}
    return {"id": str(item.get("call_id") or ""), "type": "function", "function": function}


def read_reasoning(item: JsonObject) -> JsonObject:
    """What the model wants back with the next request; its state is the server's."""
    return {name: value for name, value in item.items() if name != "status" and value is not None}


def _thought(item: JsonObject) -> str:
    parts = item.get("content") or item.get("summary") or ()
    return "\n".join(str(part.get("text") or "") for part in parts)


def read_finish_reason(payload: JsonObject, has_calls: bool) -> FinishReason:
    details = payload.get("incomplete_details")
    if isinstance(details, Mapping) and details.get("reason"):
        return FINISH_REASONS.get(str(details["reason"]), "length")
    return "tool_calls" if has_calls else "stop"


# A chat's reply, written for a caller.


def write_responses_reply(payload: JsonObject, original: JsonObject) -> JsonObject:
    """The Response for a chat `payload`; `original` is the body that asked. Raises BackendGarbage."""
    choice = check_choices(payload, "message")[0]
    head = write_head(payload, original)
    items = _write_items(choice, ResponseItemIds(head["id"]), original)
    return finish_response(head, items, choice, read_usage(payload.get("usage")) or Usage())


def write_head(payload: JsonObject, original: JsonObject) -> MutableJsonObject:
    """All that is known of a response before its first word."""
    name = str(payload.get("id") or "").removeprefix("chatcmpl-").removeprefix("resp_")
    text, reasoning = original.get("text") or {}, original.get("reasoning") or {}
    created = payload.get("created")
    return {
        "id": f"resp_{name}",
        "object": "response",
        "created_at": created if isinstance(created, int | float) else 0,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": original.get("instructions"),
        "max_output_tokens": original.get("max_output_tokens"),
        "max_tool_calls": None,
        "metadata": original.get("metadata") or {},
        "model": payload.get("model") or "unknown",
        "output": [],
        "parallel_tool_calls": original.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "prompt_cache_key": original.get("prompt_cache_key"),
        "reasoning": {"effort": reasoning.get("effort"), "summary": summary_kind(original)},
        "safety_identifier": original.get("safety_identifier"),
        "service_tier": "default",
        "store": False,
        "temperature": original.get("temperature"),
        "text": {"format": text.get("format") or {"type": "text"}, "verbosity": text.get("verbosity")},
        "tool_choice": original.get("tool_choice") or "auto",
        "tools": original.get("tools") or [],
        "top_logprobs": original.get("top_logprobs") or 0,
        "top_p": original.get("top_p"),
        "truncation": "disabled",
        "usage": None,
        "user": original.get("user"),
    }


def summary_kind(original: JsonObject) -> str | None:
    """How reasoning is to be summarised; where it is, the reasoning itself is what the summary tells."""
    reasoning = original.get("reasoning") or {}
    return reasoning.get("summary") or reasoning.get("generate_summary")


def finish_response(head: JsonObject, items: Sequence[Item], choice: ChatChoice, usage: Usage) -> JsonObject:
    """The response once the model has ended."""
    reason = INCOMPLETE_REASONS.get(str(choice.get("finish_reason")))
    return {
        **head,
        "status": "completed" if reason is None else "incomplete",
        "completed_at": None if reason else head["created_at"],
        "incomplete_details": None if reason is None else {"reason": reason},
        "output": list(items),
        "usage": write_responses_usage(usage),
    }


class ResponseItemIds:
    """Ids of one response's items."""

    def __init__(self, response_id: str) -> None:
        self._base = response_id.removeprefix("resp_")
        self._count = 0

    def next(self, kind: str) -> str:
        self._count += 1
        return f"{kind}_{self._base}_{self._count}"


def make_reasoning_item(name: str, text: str, as_summary: bool, foreign: JsonObject) -> Item:
    """`foreign`: what the provider wants back with the next request."""
    item: Item = {"id": name, "type": "reasoning", "summary": [], "content": [], "status": "completed"}
    if text and as_summary:
        item["summary"] = [{"type": "summary_text", "text": text}]
    elif text:
        item["content"] = [{"type": "reasoning_text", "text": text}]
    item["encrypted_content"] = pack_state(foreign) if foreign else None
    return item


def make_message_item(name: str, parts: Sequence[JsonObject], status: str = "completed") -> Item:
    return {"id": name, "type": "message", "role": "assistant", "status": status, "content": list(parts)}


def make_text_part(text: str, logprobs: Sequence[JsonObject]) -> Item:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def make_call_item(name: str, call_id: str, function: str, arguments: str, status: str = "completed") -> Item:
    return {
        "id": name,
        "type": "function_call",
        "call_id": call_id,
        "name": function,
        "arguments": arguments,
        "status": status,
    }


def write_logprobs(choice: ChatChoice) -> list[Item]:
    """A chat's token probabilities, each with its bytes."""
    given: object = choice.get("logprobs")
    rows = given.get("content") if isinstance(given, Mapping) else None
    return [_with_bytes(cast(TokenLogprob, row)) for row in rows or () if isinstance(row, Mapping)]


def _with_bytes(row: TokenLogprob) -> Item:
    made = _token(row)
    made["top_logprobs"] = [_token(top) for top in row.get("top_logprobs") or () if isinstance(top, dict)]
    return made


def _token(row: TokenLogprob) -> Item:
    token, given = str(row.get("token") or ""), row.get("bytes")
    return {
        "token": token,
        "bytes": given if isinstance(given, list) else list(token.encode("utf-8", "replace")),
        "logprob": row.get("logprob") or 0.0,
    }


def _write_items(choice: ChatChoice, names: ResponseItemIds, original: JsonObject) -> list[Item]:
    message = choice["message"]
    items: list[Item] = []
    foreign = foreign_state(message)
    if reasoning_text(message) or foreign:
        is_summary = summary_kind(original) is not None
        items.append(make_reasoning_item(names.next("rs"), reasoning_text(message), is_summary, foreign))
    parts: list[Item] = []
    content, refusal = message.get("content"), message.get("refusal")
    if isinstance(content, str) and content:
        parts.append(make_text_part(content, write_logprobs(choice)))
    if isinstance(refusal, str) and refusal:
        parts.append({"type": "refusal", "refusal": refusal})
    status = "incomplete" if choice.get("finish_reason") in INCOMPLETE_REASONS else "completed"
    if parts or not message.get("tool_calls"):
        items.append(make_message_item(names.next("msg"), parts or [make_text_part("", ())], status))
    for call in message.get("tool_calls") or ():
        function = reply_function(call)
        arguments = function.get("arguments") or "{}"
        items.append(
            make_call_item(names.next("fc"), str(call.get("id") or ""), str(function.get("name")), str(arguments))
        )
    return items
