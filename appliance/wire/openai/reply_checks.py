"""Checks on whole chat replies before a caller gets them. A rejected reply makes the loop ask another target."""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from appliance.errors import BackendGarbage, RejectedReply
from appliance.wire.json_schema import check_value


def choices_of(payload: object, holds: str) -> Sequence[Mapping[str, Any]]:
    """The choices of a completion, each holding its "message" (an object) or its "text". Raises BackendGarbage."""
    choices = payload.get("choices") if isinstance(payload, dict) else None
    if not isinstance(choices, list) or not choices:
        raise BackendGarbage("the target's reply has no choices")
    kind = dict if holds == "message" else str
    if not all(isinstance(choice, dict) and isinstance(choice.get(holds), kind) for choice in choices):
        raise BackendGarbage(f"a choice of the target's reply has no {holds}")
    return choices


def check_json_choice(choice: Mapping[str, Any], schema: Mapping[str, Any] | None) -> Any:
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


def check_tool_calls(choice: Mapping[str, Any], names: frozenset[str]) -> None:
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
