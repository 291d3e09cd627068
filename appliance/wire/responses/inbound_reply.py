"""A chat's reply as a Response of OpenAI's newer API."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from appliance.errors import BackendGarbage
from appliance.wire.chat_stream import counts_of, reasoning_of
from appliance.wire.opaque_state import foreign_of, pack
from appliance.wire.openai.reply_checks import choices_of

Item = dict[str, Any]

_INCOMPLETE: Final[Mapping[str, str]] = {"length": "max_output_tokens", "content_filter": "content_filter"}
_NO_BLOCKS_OF_OUR_OWN: Final[frozenset[str]] = frozenset()


def response_of(payload: Mapping[str, Any], original: Mapping[str, Any]) -> Mapping[str, Any]:
    """The Response for a chat `payload`; `original` is the body that asked. Raises BackendGarbage."""
    choice = choices_of(payload, "message")[0]
    head = head_of(payload, original)
    return ended(head, _items(choice, ResponseItemIds(head["id"]), original), choice, payload.get("usage"))


def head_of(payload: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
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
        "reasoning": {"effort": reasoning.get("effort"), "summary": summary_of(original)},
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


def summary_of(original: Mapping[str, Any]) -> str | None:
    """How reasoning is to be summarised; where it is, the reasoning itself is what the summary tells."""
    reasoning = original.get("reasoning") or {}
    return reasoning.get("summary") or reasoning.get("generate_summary")


def ended(head: Mapping[str, Any], items: Sequence[Item], choice: Mapping[str, Any], usage: Any) -> dict[str, Any]:
    """The response once the model has ended."""
    reason = _INCOMPLETE.get(str(choice.get("finish_reason")))
    return {
        **head,
        "status": "completed" if reason is None else "incomplete",
        "completed_at": None if reason else head["created_at"],
        "incomplete_details": None if reason is None else {"reason": reason},
        "output": list(items),
        "usage": usage_of(usage),
    }


def usage_of(usage: Any) -> Mapping[str, Any]:
    prompt, cached, answer, reasoning = counts_of(usage)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": answer,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": prompt + answer,
    }


class ResponseItemIds:
    """Ids of one response's items."""

    def __init__(self, response_id: str) -> None:
        self._base = response_id.removeprefix("resp_")
        self._count = 0

    def next(self, kind: str) -> str:
        self._count += 1
        return f"{kind}_{self._base}_{self._count}"


def reasoning_item(name: str, text: str, as_summary: bool, foreign: Mapping[str, Any]) -> Item:
    """`foreign`: what the provider wants back with the next request."""
    item: Item = {"id": name, "type": "reasoning", "summary": [], "content": [], "status": "completed"}
    if text and as_summary:
        item["summary"] = [{"type": "summary_text", "text": text}]
    elif text:
        item["content"] = [{"type": "reasoning_text", "text": text}]
    item["encrypted_content"] = pack(foreign) if foreign else None
    return item


def message_item(name: str, parts: Sequence[Mapping[str, Any]], status: str = "completed") -> Item:
    return {"id": name, "type": "message", "role": "assistant", "status": status, "content": list(parts)}


def text_part(text: str, logprobs: Sequence[Mapping[str, Any]]) -> Item:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def call_item(name: str, call_id: str, function: str, arguments: str, status: str = "completed") -> Item:
    return {
        "id": name,
        "type": "function_call",
        "call_id": call_id,
        "name": function,
        "arguments": arguments,
        "status": status,
    }


def logprobs_of(choice: Mapping[str, Any]) -> list[Item]:
    """A chat's token probabilities, each with its bytes."""
    given = choice.get("logprobs")
    rows = given.get("content") if isinstance(given, dict) else None
    return [_with_bytes(row) for row in rows or () if isinstance(row, dict)]


def _with_bytes(row: Mapping[str, Any]) -> Item:
    made = _token(row)
    made["top_logprobs"] = [_token(top) for top in row.get("top_logprobs") or () if isinstance(top, dict)]
    return made


def _token(row: Mapping[str, Any]) -> Item:
    token, given = str(row.get("token") or ""), row.get("bytes")
    return {
        "token": token,
        "bytes": given if isinstance(given, list) else list(token.encode("utf-8", "replace")),
        "logprob": row.get("logprob") or 0.0,
    }


def foreign_of_any(message: Mapping[str, Any]) -> dict[str, Any]:
    """All blocks are somebody's own here: this API has none that clients could read."""
    return foreign_of(message, _NO_BLOCKS_OF_OUR_OWN)


def _items(choice: Mapping[str, Any], names: ResponseItemIds, original: Mapping[str, Any]) -> list[Item]:
    message = choice["message"]
    items: list[Item] = []
    foreign = foreign_of_any(message)
    if reasoning_of(message) or foreign:
        is_summary = summary_of(original) is not None
        items.append(reasoning_item(names.next("rs"), reasoning_of(message), is_summary, foreign))
    parts: list[Item] = []
    if isinstance(message.get("content"), str) and message["content"]:
        parts.append(text_part(message["content"], logprobs_of(choice)))
    if isinstance(message.get("refusal"), str) and message["refusal"]:
        parts.append({"type": "refusal", "refusal": message["refusal"]})
    status = "incomplete" if choice.get("finish_reason") in _INCOMPLETE else "completed"
    if parts or not message.get("tool_calls"):
        items.append(message_item(names.next("msg"), parts or [text_part("", ())], status))
    for call in message.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise BackendGarbage("a tool call of the target's reply has no function")
        arguments = function.get("arguments") or "{}"
        items.append(call_item(names.next("fc"), str(call.get("id") or ""), str(function.get("name")), str(arguments)))
    return items
