"""Anthropic's messages and a chat's replies, each made of the other; what ends them, and how errors look."""

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from appliance.core import Usage
from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.errors import ApplianceError, BackendGarbage
from appliance.wire.anthropic.outbound import answer_tool
from appliance.wire.chat_ir import (
    ChatChoice,
    ChatDelta,
    ChatMessage,
    FinishReason,
    ToolCall,
    function_call,
    json_text,
    reasoning_text,
    thinking_blocks,
)
from appliance.wire.chat_replies import check_choices, make_completion, read_reply_call
from appliance.wire.dialect import WireRequest
from appliance.wire.opaque_state import foreign_state, pack_state
from appliance.wire.usage import UsageShape, read_usage

ANTHROPIC_USAGE: Final = UsageShape(
    prompt=("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"),
    completion=("output_tokens",),
    cached="cache_read_input_tokens",
    reasoning="output_tokens_details.thinking_tokens",
    cache_write="cache_creation_input_tokens",
    cache_write_long="cache_creation.ephemeral_1h_input_tokens",
)
"""Anthropic counts what is read from and written to its cache beside the other input."""

FINISH_REASONS: Final[Mapping[str, FinishReason]] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content_filter",
}
STOP_REASONS: Final[Mapping[str, str]] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
"""The way back: a chat's finish reason -> Anthropic's stop reason."""
_TIERS: Final[Mapping[str, str]] = {"standard": "default", "priority": "priority", "batch": "flex"}
_REFUSED: Final = "The model declined to answer this request."

_ERROR_TYPES: Final[Mapping[int, str]] = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""What Anthropic's API calls an error of each status; others: invalid_request_error, from 500 on api_error."""

OWN_BLOCKS: Final = frozenset({"thinking", "redacted_thinking"})


# A target's reply, read.


def read_anthropic_reply(request: WireRequest, payload: JsonObject) -> tuple[JsonObject, Usage]:
    """A whole message as a chat completion. Raises BackendGarbage."""
    target, tool = request.target, answer_tool(request.outgoing.body)
    blocks = payload.get("content")
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise BackendGarbage(f"{target.name} answered without content")
    usage = ANTHROPIC_USAGE.read(payload.get("usage")) or Usage()
    message = _read_message(blocks, tool)
    refusal = read_refusal(payload)
    if refusal is not None:
        message["refusal"] = refusal
    choice: ChatChoice = {"index": 0, "message": message, "logprobs": None, **read_ending(payload, tool)}
    tier = _TIERS.get(str((payload.get("usage") or {}).get("service_tier")))
    identity, model = str(payload.get("id") or ""), str(payload.get("model") or target.model)
    return make_completion(identity, model, [choice], usage, service_tier=tier), usage


def _read_message(blocks: Sequence[JsonObject], json_tool: str | None) -> ChatMessage:
    texts: list[str] = []
    thoughts: list[str] = []
    own: list[JsonObject] = []
    calls: list[ToolCall] = []
    for block in blocks:
        match block.get("type"):
            case "text":
                texts.append(block.get("text") or "")
            case "thinking":
                thoughts.append(block.get("thinking") or "")
                own.append(block)
            case "redacted_thinking":
                own.append(block)
            case "tool_use" if block.get("name") == json_tool:
                texts.append(json_text(block.get("input")))
            case "tool_use":
                calls.append(function_call(str(block.get("id") or ""), block["name"], block.get("input") or {}))
    message: ChatMessage = {"role": "assistant", "content": "".join(texts) if texts else None, "refusal": None}
    if any(thoughts):
        message["reasoning_content"] = "".join(thoughts)
    if own:
        message["thinking_blocks"] = own
    if calls:
        message["tool_calls"] = calls
    return message


def read_ending(payload: JsonObject, json_tool: str | None) -> ChatChoice:
    """Finish reason, and which stop sequence it was (as vLLM reports it)."""
    finish = FINISH_REASONS.get(str(payload.get("stop_reason")), "stop")
    if json_tool is not None and finish == "tool_calls":
        finish = "stop"
    sequence = payload.get("stop_sequence")
    return {"finish_reason": finish, "stop_reason": sequence} if sequence else {"finish_reason": finish}


def read_refusal(payload: JsonObject) -> str | None:
    if payload.get("stop_reason") != "refusal":
        return None
    details = payload.get("stop_details")
    said = details.get("explanation") if isinstance(details, Mapping) else None
    return said or _REFUSED


# A chat's reply, written for a caller.


def write_anthropic_reply(payload: JsonObject, original: JsonObject) -> JsonObject:
    """The message for a chat `payload`; `original` is the body that asked. Raises BackendGarbage."""
    choice = check_choices(payload, "message")[0]
    message = choice["message"]
    reason, stop = write_stop(choice, original, bool(message.get("tool_calls")))
    return {
        **write_head(payload),
        "content": _write_content(message, hides_thinking(original)),
        "stop_reason": "refusal" if message.get("refusal") else reason,
        "stop_sequence": stop,
        "usage": write_anthropic_usage(read_usage(payload.get("usage")) or Usage()),
    }


def write_head(payload: JsonObject) -> MutableJsonObject:
    """What stands on a message beside its content. `payload`: a chat completion or chunk."""
    given = str(payload.get("id") or "")
    name = given.removeprefix("chatcmpl-").removeprefix("msg_")
    return {"id": f"msg_{name}", "type": "message", "role": "assistant", "model": payload.get("model") or "unknown"}


def hides_thinking(original: JsonObject) -> bool:
    """Whether the caller wants no thinking shown."""
    thinking = original.get("thinking")
    return isinstance(thinking, Mapping) and thinking.get("display") == "omitted"


def write_stop(choice: ChatChoice, original: JsonObject, has_calls: bool) -> tuple[str, str | None]:
    """Why the answer ended, and which of the caller's stop sequences it was, where the target says so."""
    if has_calls and choice.get("finish_reason") != "length":
        return "tool_use", None
    found, stops = choice.get("stop_reason"), original.get("stop_sequences")
    if isinstance(found, str) and isinstance(stops, Collection) and found in stops:
        return "stop_sequence", found
    return STOP_REASONS.get(str(choice.get("finish_reason")), "end_turn"), None


def write_anthropic_usage(usage: Usage) -> JsonObject:
    """Anthropic counts cached tokens beside the others, not among them."""
    cached, written = usage.cached_tokens, usage.cache_write_tokens
    return {
        "input_tokens": max(0, usage.prompt_tokens - cached - written),
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.completion_tokens,
    }


def own_thinking_blocks(message: ChatDelta) -> list[JsonObject]:
    return [block for block in thinking_blocks(message) if block.get("type") in OWN_BLOCKS]


def write_thinking_block(block: JsonObject, is_hidden: bool) -> JsonObject:
    """Thinking of a model that signs none has an empty signature."""
    if block.get("type") == "redacted_thinking":
        return {"type": "redacted_thinking", "data": str(block.get("data") or "")}
    text = "" if is_hidden else str(block.get("thinking") or "")
    return {"type": "thinking", "thinking": text, "signature": str(block.get("signature") or "")}


def write_state_block(message: ChatDelta) -> JsonObject | None:
    """A block that holds what other dialects want back."""
    foreign = foreign_state(message, OWN_BLOCKS)
    return {"type": "redacted_thinking", "data": pack_state(foreign)} if foreign else None


def _write_content(message: ChatMessage, is_hidden: bool) -> Sequence[JsonObject]:
    blocks = [write_thinking_block(block, is_hidden) for block in own_thinking_blocks(message)]
    thought = reasoning_text(message)
    if not blocks and thought:
        blocks.append(write_thinking_block({"type": "thinking", "thinking": thought}, is_hidden))
    state = write_state_block(message)
    if state is not None:
        blocks.append(state)
    for text in (message.get("content"), message.get("refusal")):
        if isinstance(text, str) and text:
            blocks.append({"type": "text", "text": text, "citations": None})
    return [*blocks, *(_write_tool_use(call) for call in message.get("tool_calls") or ())]


def _write_tool_use(call: ToolCall) -> JsonObject:
    function, arguments = read_reply_call(call)
    return {"type": "tool_use", "id": str(call.get("id") or ""), "name": function.get("name"), "input": arguments}


def write_anthropic_error(error: ApplianceError, request_id: str | None = None) -> JsonObject:
    """The body of an error; without an id, as an event of a stream."""
    kind = _ERROR_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    body = {"type": "error", "error": {"type": kind, "message": error.message}}
    return body if request_id is None else {**body, "request_id": request_id}


def anthropic_error_status(error: ApplianceError) -> int:
    """Overload has a status of its own there, and clients look for it."""
    return 529 if error.status == 503 else error.status
