"""A chat's reply as Anthropic's message."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import orjson

from appliance.errors import BackendGarbage
from appliance.wire.chat_stream import counts_of, reasoning_of, thinking_blocks_of
from appliance.wire.opaque_state import foreign_of, pack
from appliance.wire.openai.reply_checks import choices_of

_STOP_REASONS: Final[Mapping[str, str]] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}

OWN_BLOCKS: Final = frozenset({"thinking", "redacted_thinking"})


def message_of(payload: Mapping[str, Any], original: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message for a chat `payload`; `original` is the body that asked. Raises BackendGarbage."""
    choice = choices_of(payload, "message")[0]
    reason, stop = stop_of(choice, original, bool(choice["message"].get("tool_calls")))
    return {
        **head_of(payload),
        "content": _content(choice["message"], is_hidden(original)),
        "stop_reason": "refusal" if choice["message"].get("refusal") else reason,
        "stop_sequence": stop,
        "usage": usage_of(payload.get("usage")),
    }


def head_of(payload: Mapping[str, Any]) -> dict[str, Any]:
    given = str(payload.get("id") or "")
    name = given.removeprefix("chatcmpl-").removeprefix("msg_")
    return {"id": f"msg_{name}", "type": "message", "role": "assistant", "model": payload.get("model") or "unknown"}


def is_hidden(original: Mapping[str, Any]) -> bool:
    """Whether the caller wants no thinking shown."""
    thinking = original.get("thinking")
    return isinstance(thinking, dict) and thinking.get("display") == "omitted"


def stop_of(choice: Mapping[str, Any], original: Mapping[str, Any], has_calls: bool) -> tuple[str, str | None]:
    """Why the answer ended, and which of the caller's stop sequences it was, where the target tells."""
    if has_calls and choice.get("finish_reason") != "length":
        return "tool_use", None
    found, stops = choice.get("stop_reason"), original.get("stop_sequences")
    if isinstance(found, str) and isinstance(stops, Collection) and found in stops:
        return "stop_sequence", found
    return _STOP_REASONS.get(str(choice.get("finish_reason")), "end_turn"), None


def usage_of(usage: Any) -> Mapping[str, Any]:
    """Anthropic counts cached tokens beside the others, not among them."""
    prompt, cached, answer, _ = counts_of(usage)
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    written = details.get("cache_write_tokens") if isinstance(details, dict) else 0
    written = written if type(written) is int and written > 0 else 0
    return {
        "input_tokens": max(0, prompt - cached - written),
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": cached,
        "output_tokens": answer,
    }


def _content(message: Mapping[str, Any], hides_thinking: bool) -> Sequence[Mapping[str, Any]]:
    blocks = [thinking_block(block, hides_thinking) for block in own_blocks_of(message)]
    if not blocks and reasoning_of(message):
        blocks.append(thinking_block({"type": "thinking", "thinking": reasoning_of(message)}, hides_thinking))
    foreign = foreign_of(message, OWN_BLOCKS)
    if foreign:
        blocks.append({"type": "redacted_thinking", "data": pack(foreign)})
    for name in ("content", "refusal"):
        text = message.get(name)
        if isinstance(text, str) and text:
            blocks.append({"type": "text", "text": text, "citations": None})
    return [*blocks, *(_tool_use(call) for call in message.get("tool_calls") or ())]


def own_blocks_of(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return [block for block in thinking_blocks_of(message) if block.get("type") in OWN_BLOCKS]


def thinking_block(block: Mapping[str, Any], hides_thinking: bool) -> dict[str, Any]:
    """Thinking of a model that signs none has an empty signature."""
    if block.get("type") == "redacted_thinking":
        return {"type": "redacted_thinking", "data": str(block.get("data") or "")}
    text = "" if hides_thinking else str(block.get("thinking") or "")
    return {"type": "thinking", "thinking": text, "signature": str(block.get("signature") or "")}


def _tool_use(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise BackendGarbage("a tool call of the target's reply has no function")
    try:
        given = orjson.loads(function.get("arguments") or "{}")
    except (orjson.JSONDecodeError, TypeError) as error:
        raise BackendGarbage("the arguments of a tool call are not JSON") from error
    return {"type": "tool_use", "id": str(call.get("id") or ""), "name": function.get("name"), "input": given}
