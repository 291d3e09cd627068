"""OpenAI's Responses API as an outbound API, for models that speak nothing else. Stateless: nothing is stored there."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from appliance.core import Target, UpstreamCall, Usage
from appliance.errors import BackendGarbage
from appliance.wire.chat_fields import (
    ChatFields,
    body_bytes,
    called_function,
    functions_of,
    image_url_of,
    mapping_of,
    own_blocks,
    parts_of,
    read_tool_choice,
    role_of,
    text_of,
    unsupported,
    word_of,
)
from appliance.wire.dialect import WireRequest, most_output_tokens
from appliance.wire.sse import read_usage
from appliance.wire.stream_translator import ChunkTranslator, completion, wants_usage

_SAME: Final = (
    "temperature",
    "top_p",
    "metadata",
    "parallel_tool_calls",
    "safety_identifier",
    "service_tier",
    "user",
)
_CACHING: Final = ("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options")
_FINISHES: Final[Mapping[str, str]] = {"max_output_tokens": "length", "content_filter": "content_filter"}


def write(target: Target, outgoing: UpstreamCall, *, stream: bool) -> WireRequest:
    """Raises Unsupported for the first field that cannot be carried over, RequestError."""
    body = response_request(target, outgoing.body)
    if stream:
        body["stream"] = True
    query = f"?{target.wire.query}" if target.wire.query else ""
    most = most_output_tokens(target, outgoing, body)
    headers = dict(target.wire.headers)
    return WireRequest(target, outgoing, f"/responses{query}", body_bytes(target, body), headers, most)


def response_request(target: Target, given: Mapping[str, Any]) -> dict[str, Any]:
    fields = ChatFields(target, given)
    body: dict[str, Any] = {"model": target.model, "store": False}
    body["input"] = list(_items(target, fields.take("messages") or ()))
    body |= {name: value for name in _SAME if (value := fields.take(name)) is not None}
    body |= {name: given[name] for name in _CACHING if given.get(name) is not None}
    limit = fields.take_first("max_completion_tokens", "max_tokens")
    if limit is not None:
        body["max_output_tokens"] = limit
    includes = []
    if "reasoning" in target.abilities:
        body["reasoning"] = {"summary": "auto"}
        includes.append("reasoning.encrypted_content")
    effort = fields.take("reasoning_effort")
    if effort is not None:
        body["reasoning"] = {**body.get("reasoning", {}), "effort": effort}
    if fields.take("logprobs"):
        includes.append("message.output_text.logprobs")
        body["top_logprobs"] = fields.take("top_logprobs") or 0
    if includes:
        body["include"] = includes
    _write_text(fields, body)
    _write_tools(target, fields, body)
    fields.drop("model", "stream", "stream_options")
    fields.finish()
    return body


def _write_text(fields: ChatFields, body: dict[str, Any]) -> None:
    text: dict[str, Any] = {}
    format = fields.take("response_format")
    if isinstance(format, Mapping):
        inner = format.get("json_schema")
        text["format"] = {"type": "json_schema", **inner} if isinstance(inner, Mapping) else dict(format)
    verbosity = fields.take("verbosity")
    if verbosity is not None:
        text["verbosity"] = verbosity
    if text:
        body["text"] = text


def _write_tools(target: Target, fields: ChatFields, body: dict[str, Any]) -> None:
    tools = functions_of(target, fields.take("tools") or ())
    choice = read_tool_choice(target, fields.take("tool_choice"))
    if not tools:
        return
    body["tools"] = [
        {
            "type": "function",
            "name": tool["function"]["name"],
            "description": tool["function"].get("description"),
            "parameters": tool["function"].get("parameters") or {"type": "object", "properties": {}},
            "strict": bool(tool["function"].get("strict")),
        }
        for tool in tools
    ]
    if choice is None:
        return
    if choice.mode == "named":
        body["tool_choice"] = {"type": "function", "name": choice.names[0]}
    elif choice.names:
        names = [{"type": "function", "name": name} for name in choice.names]
        body["tool_choice"] = {"type": "allowed_tools", "mode": choice.mode, "tools": names}
    else:
        body["tool_choice"] = choice.mode


def _items(target: Target, messages: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        match role := role_of(target, message, path):
            case "assistant":
                yield from _assistant(target, message, path)
            case "tool":
                output = [_input_part(target, part, f"{path}.content") for part in parts_of(message.get("content"))]
                plain = "".join(part["text"] for part in output if part["type"] == "input_text")
                is_text = all(part["type"] == "input_text" for part in output)
                yield {
                    "type": "function_call_output",
                    "call_id": message.get("tool_call_id"),
                    "output": plain if is_text else output,
                }
            case "user" | "system" | "developer":
                parts = [
                    _input_part(target, part, f"{path}.content[{position}]")
                    for position, part in enumerate(parts_of(message.get("content")))
                ]
                yield {"type": "message", "role": role, "content": parts}
            case _:
                raise unsupported(target, f"{path}.role", f"there is no role {role!r}")


def _assistant(target: Target, message: Mapping[str, Any], path: str) -> Iterator[dict[str, Any]]:
    yield from own_blocks(message, frozenset({"reasoning"}))
    said = "".join(_said(target, message, path))
    if said:
        yield {"type": "message", "role": "assistant", "content": said}
    for index, call in enumerate(message.get("tool_calls") or ()):
        function = called_function(target, call, f"{path}.tool_calls[{index}]")
        yield {
            "type": "function_call",
            "call_id": call.get("id"),
            "name": function["name"],
            "arguments": function.get("arguments") or "{}",
        }


def _said(target: Target, message: Mapping[str, Any], path: str) -> Iterator[str]:
    """As plain text: the items that the API itself makes of an answer have ids, and those were not kept."""
    for part in parts_of(message.get("content")):
        text = text_of(part)
        if text is None:
            raise unsupported(target, f"{path}.content", "only text can stand here")
        yield text
    refusal = word_of(message.get("refusal"), f"{path}.refusal")
    if refusal:
        yield refusal


def _input_part(target: Target, part: Mapping[str, Any], where: str) -> dict[str, Any]:
    text = text_of(part)
    if text is not None:
        written: dict[str, Any] = {"type": "input_text", "text": text}
    elif part.get("type") == "image_url":
        image = part.get("image_url")
        detail = image.get("detail") if isinstance(image, Mapping) else None
        written = {"type": "input_image", "image_url": image_url_of(part, where), "detail": detail or "auto"}
    elif part.get("type") == "file":
        written = {"type": "input_file", **(mapping_of(part.get("file"), f"{where}.file") or {})}
    else:
        raise unsupported(target, where, f"there are no parts of type {part.get('type')!r}")
    breakpoint_ = part.get("prompt_cache_breakpoint")
    return {**written, "prompt_cache_breakpoint": breakpoint_} if breakpoint_ else written


def read(letter: WireRequest, payload: dict[str, Any]) -> tuple[dict[str, Any], Usage]:
    """A whole response as a chat completion. Raises BackendGarbage."""
    output = payload.get("output")
    if not isinstance(output, list) or not all(isinstance(item, dict) for item in output):
        raise BackendGarbage(f"{letter.target.name} answered without output")
    usage = read_usage(payload.get("usage")) or Usage()
    message, logprobs = _message(output)
    finish = _finish_of(payload, bool(message.get("tool_calls")))
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish}
    identity, model = str(payload.get("id") or ""), str(payload.get("model") or letter.target.model)
    return completion(identity, model, [choice], usage, service_tier=payload.get("service_tier")), usage


def _message(output: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    texts: list[str] = []
    refusals: list[str] = []
    thoughts: list[str] = []
    own: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    scored: list[Any] = []
    for item in output:
        match item.get("type"):
            case "message":
                for part in item.get("content") or ():
                    (texts if part.get("type") == "output_text" else refusals).append(text_of(part) or "")
                    scored += part.get("logprobs") or ()
            case "reasoning":
                own.append(_own(item))
                thoughts.append(_thought(item))
            case "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments")}
                calls.append({"id": item.get("call_id"), "type": "function", "function": function})
    message: dict[str, Any] = {
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


def _own(item: Mapping[str, Any]) -> dict[str, Any]:
    """What the model wants back with the next request; its state is the server's."""
    return {name: value for name, value in item.items() if name != "status" and value is not None}


def _thought(item: Mapping[str, Any]) -> str:
    parts = item.get("content") or item.get("summary") or ()
    return "\n".join(str(part.get("text") or "") for part in parts)


def _finish_of(payload: Mapping[str, Any], has_calls: bool) -> str:
    details = payload.get("incomplete_details")
    if isinstance(details, Mapping) and details.get("reason"):
        return _FINISHES.get(str(details["reason"]), "length")
    return "tool_calls" if has_calls else "stop"


class ResponsesStreamTranslator(ChunkTranslator):
    """The events of one response. Text, refusal, thought and arguments are passed on as they come."""

    def __init__(self, letter: WireRequest) -> None:
        super().__init__(letter.target.model, keep_usage=wants_usage(letter.outgoing.body))
        self._calls: dict[int, int] = {}
        """Output item -> index of the tool call."""
        self._thought = 0

    def _take(self, event: dict[str, Any]) -> Iterator[bytes]:
        match event.get("type"):
            case "response.created":
                response = event.get("response") or {}
                self.identity = str(response.get("id") or "")
                self._model = str(response.get("model") or self._model)
                yield self._chunk({"role": "assistant", "content": ""})
            case "response.completed" | "response.incomplete":
                yield from self._ends(event.get("response") or {})
            case "response.failed":
                self.error = (event.get("response") or {}).get("error") or {"message": "the response failed"}
            case "error":
                self.error = {name: event.get(name) for name in ("message", "code", "param")}
            case _:
                yield from self._take_output(event)

    def _take_output(self, event: dict[str, Any]) -> Iterator[bytes]:
        position, said = event.get("output_index", 0), event.get("delta", "")
        match event.get("type"):
            case "response.output_text.delta":
                scored = event.get("logprobs")
                more = {"logprobs": {"content": scored, "refusal": None}} if scored else {}
                yield self._chunk({"content": said}, more=more)
            case "response.refusal.delta":
                yield self._chunk({"refusal": said})
            case "response.reasoning_summary_text.delta" | "response.reasoning_text.delta":
                yield self._chunk({"reasoning_content": said})
            case "response.output_item.added":
                yield from self._item_added(position, event.get("item") or {})
            case "response.function_call_arguments.delta" if position in self._calls:
                call = {"index": self._calls[position], "function": {"arguments": said}}
                yield self._chunk({"tool_calls": [call]})
            case "response.output_item.done":
                item = event.get("item") or {}
                if item.get("type") == "reasoning":
                    yield self._chunk({"thinking_blocks": [{"index": self._thought, **_own(item)}]})
                    self._thought += 1

    def _item_added(self, position: int, item: Mapping[str, Any]) -> Iterator[bytes]:
        if item.get("type") != "function_call":
            return
        number = self._calls[position] = len(self._calls)
        function = {"name": item.get("name"), "arguments": item.get("arguments") or ""}
        call = {"index": number, "id": item.get("call_id"), "type": "function", "function": function}
        yield self._chunk({"tool_calls": [call]})

    def _ends(self, response: Mapping[str, Any]) -> Iterator[bytes]:
        self.usage = read_usage(response.get("usage"))
        yield self._chunk({}, finish=_finish_of(response, bool(self._calls)))
        yield self._finish()
