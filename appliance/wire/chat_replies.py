"""Whole replies of a chat: made of what a target answered, and checked before a caller gets them.

A rejected reply makes the loop ask another target.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from appliance.core import Usage
from appliance.core.json_types import JsonSchema
from appliance.errors import BackendGarbage, RejectedReply
from appliance.wire.chat_ir import SHAPE_ERRORS, CalledFunction, ChatChoice, ChatCompletion, ChatMessage, ToolCall
from appliance.wire.json_schema import check_value
from appliance.wire.sse import read_events
from appliance.wire.usage import write_usage


def make_completion(
    identity: str, model: str, choices: Sequence[ChatChoice], usage: Usage, *, service_tier: str | None = None
) -> ChatCompletion:
    """A chat completion as OpenAI's API gives it."""
    made: ChatCompletion = {
        "id": identity,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": list(choices),
        "usage": write_usage(usage),
    }
    if service_tier is not None:
        made["service_tier"] = service_tier
    return made


def check_choices(payload: object, holds: str) -> Sequence[ChatChoice]:
    """The choices of a completion, each holding its "message" (an object) or its "text". Raises BackendGarbage."""
    choices = payload.get("choices") if isinstance(payload, dict) else None
    if not isinstance(choices, list) or not choices:
        raise BackendGarbage("the target's reply has no choices")
    kind = dict if holds == "message" else str
    if not all(isinstance(choice, dict) and isinstance(choice.get(holds), kind) for choice in choices):
        raise BackendGarbage(f"a choice of the target's reply has no {holds}")
    return choices


def read_reply_call(call: ToolCall) -> tuple[CalledFunction, Any]:
    """The function of a tool call in a reply, and its arguments as JSON. Raises BackendGarbage."""
    function = reply_function(call)
    try:
        return function, orjson.loads(function.get("arguments") or "{}")
    except (orjson.JSONDecodeError, TypeError) as error:
        raise BackendGarbage("the arguments of a tool call are not JSON") from error


def reply_function(call: ToolCall) -> CalledFunction:
    """Raises BackendGarbage where the call has no function."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise BackendGarbage("a tool call of the target's reply has no function")
    return function


def check_json_choice(choice: ChatChoice, schema: JsonSchema | None) -> Any:
    """The object in a choice that was asked for JSON. Raises RejectedReply.

    None where the model refused or called a tool instead: both are answers, and neither carries JSON.
    """
    message = choice["message"]
    if message.get("tool_calls") or message.get("refusal"):
        return None
    if choice.get("finish_reason") == "length":
        raise RejectedReply("the reply was cut off before its JSON was complete: raise max_tokens")
    content = message.get("content")
    if not isinstance(content, str):
        raise RejectedReply("the reply has no content where JSON was asked for")
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise RejectedReply(f"the reply is not valid JSON: {error}") from error
    if schema is None:
        if not isinstance(value, dict):
            raise RejectedReply("the reply is not a JSON object")
    else:
        check_value(schema, value)
    return value


def check_tool_calls(choice: ChatChoice, names: frozenset[str]) -> None:
    """Raise RejectedReply where a call names no tool that was offered, or its arguments are not a JSON object.

    A reply that its length cut off says so by its `finish_reason`: the last call of such a one may be unfinished.
    """
    calls = choice["message"].get("tool_calls") or ()
    for position, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            continue  # custom tools carry free text
        if function.get("name") not in names:
            raise RejectedReply(f"the reply calls {function.get('name')!r}, which is not one of the tools offered")
        if choice.get("finish_reason") == "length" and position == len(calls) - 1:
            continue
        try:
            arguments = orjson.loads(function.get("arguments") or "{}")
        except (orjson.JSONDecodeError, TypeError) as error:
            raise RejectedReply(f"the arguments for tool {function['name']!r} are not JSON") from error
        if not isinstance(arguments, dict):
            raise RejectedReply(f"the arguments for tool {function['name']!r} are not a JSON object")


class ChatStreamCheck:
    """Puts the choices of a passing stream together, and gives each to `check` once the stream is whole."""

    def __init__(self, check: Callable[[ChatChoice], object]) -> None:
        self._check = check
        self._choices: dict[int, _StreamedChoice] = {}
        self._is_odd = False

    def feed(self, block: bytes) -> None:
        for data in read_events(block):
            if data == b"[DONE]":
                continue
            try:
                for choice in orjson.loads(data).get("choices") or ():
                    self._choices.setdefault(choice.get("index", 0), _StreamedChoice()).add(choice)
            except SHAPE_ERRORS:
                self._is_odd = True

    def finish(self) -> None:
        if self._is_odd:
            raise RejectedReply("an event of the stream is not what the dialect promises")
        if not self._choices:
            raise RejectedReply("the reply has no choice at all")
        for choice in self._choices.values():
            self._check(choice.as_choice())


class _StreamedChoice:
    """One choice, as its deltas come."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._refusal: list[str] = []
        self._calls: dict[int, _StreamedCall] = {}
        self._finish: str | None = None

    def add(self, choice: ChatChoice) -> None:
        delta = choice.get("delta") or {}
        content, refusal = delta.get("content"), delta.get("refusal")
        if isinstance(content, str):
            self._content.append(content)
        if refusal:
            self._refusal.append(refusal)
        for part in delta.get("tool_calls") or ():
            self._add_call(part)
        self._finish = choice.get("finish_reason") or self._finish

    def _add_call(self, part: ToolCall) -> None:
        """Some servers send each call whole, without an index."""
        number = part.get("index")
        if number is None:
            number = len(self._calls) if part.get("id") else len(self._calls) - 1
        call = self._calls.setdefault(number, _StreamedCall())
        function = part.get("function")
        if function is not None:
            call.name = function.get("name") or call.name
            call.arguments.append(function.get("arguments") or "")

    def as_choice(self) -> ChatChoice:
        calls = [call.as_call() for _, call in sorted(self._calls.items())]
        content = "".join(self._content) if self._content else None
        message: ChatMessage = {"content": content, "refusal": "".join(self._refusal), "tool_calls": calls}
        return {"message": message, "finish_reason": self._finish}


class _StreamedCall:
    """One tool call, as its pieces come. A custom tool's has no arguments."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.arguments: list[str] = []

    def as_call(self) -> ToolCall:
        if self.name is None and not self.arguments:
            return {}
        return {"function": {"name": self.name or "", "arguments": "".join(self.arguments)}}
