"""A chat as a request of Anthropic's Messages API, as the official SDK types it. Chat only.

Beyond OpenAI's own fields these are carried over where they are given: `top_k`, `thinking` (Anthropic's own object,
instead of `reasoning_effort`), `cache_control` on the body, a message, a part or a tool, and `is_error` on a tool's
message.
"""

from collections.abc import Mapping
from typing import Final

from appliance.core import Target, UpstreamCall
from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.errors import Unsupported
from appliance.wire.anthropic.outbound_blocks import write_messages
from appliance.wire.anthropic.output_schema import narrow_schema
from appliance.wire.chat_fields import DEFAULT_OUTPUT_TOKENS, ChatFields, ChosenTools, unsupported
from appliance.wire.chat_ir import EFFORT_TOKENS, ChatTool
from appliance.wire.dialect import CHAT_PATH, WireRequest, add_query, make_wire_request

_JSON_TOOL: Final = "json_answer"
"""Anthropic has no JSON without a schema: a tool that takes any object and must be called is the same."""

MIN_BUDGET_TOKENS: Final = 1_024
"""Anthropic takes no smaller budget."""

_SAMPLING: Final = ("temperature", "top_p", "top_k")
EFFORTS: Final[Mapping[str, str]] = {
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "xhigh",
    "max": "max",
}
"""Chat's reasoning efforts -> Anthropic's."""
_TIERS: Final[Mapping[str, str]] = {"auto": "auto", "default": "standard_only", "standard_only": "standard_only"}


def write_anthropic_request(target: Target, outgoing: UpstreamCall, *, stream: bool, salt: str) -> WireRequest:
    """Raises Unsupported for another path than chat, or the first field that cannot be carried over; RequestError."""
    if outgoing.path != CHAT_PATH:
        raise Unsupported(f"{target.name} speaks Anthropic's Messages API, which has no {outgoing.path}", param="model")
    body = write_message_body(target, outgoing.body)
    if stream:
        body["stream"] = True
    return make_wire_request(target, outgoing, add_query(target, "/messages"), body)


def answer_tool(body: JsonObject) -> str | None:
    """The tool whose input is the answer, where a chat asks for JSON without a schema."""
    format = body.get("response_format")
    is_json = isinstance(format, Mapping) and format.get("type") == "json_object"
    return _JSON_TOOL if is_json else None


def write_message_body(target: Target, given: JsonObject) -> MutableJsonObject:
    """The body of `/messages`. Raises Unsupported for the first field that cannot be carried over, RequestError."""
    fields = ChatFields(target, given)
    body: MutableJsonObject = {"model": target.model}
    limit = fields.first("max_completion_tokens", "max_tokens")
    body |= write_messages(target, fields.messages())
    _write_tools(target, fields, body)
    _write_thinking(target, fields, body, limit)
    _write_format(target, fields, body)
    _write_sampling(target, fields, body)
    _write_account(target, fields, body)
    stops = fields.stops()
    if stops:
        body["stop_sequences"] = stops
    if given.get("cache_control"):
        body["cache_control"] = given["cache_control"]
    fields.accept("model", "stream", "stream_options")
    fields.finish()
    return body


def _write_tools(target: Target, fields: ChatFields, body: MutableJsonObject) -> None:
    tools = fields.tools()
    choice = fields.tool_choice()
    is_parallel = fields.get("parallel_tool_calls")
    if not tools:
        return
    if choice is not None and choice.names and choice.mode != "named":
        tools = [tool for tool in tools if tool["function"]["name"] in choice.names]
    body["tools"] = [_tool(tool) for tool in tools]
    written = _tool_choice(choice)
    if is_parallel is False and written.get("type") != "none":
        written["disable_parallel_tool_use"] = True
    if choice is not None or is_parallel is False:
        body["tool_choice"] = written


def _tool(tool: ChatTool) -> JsonObject:
    function = tool["function"]
    written: MutableJsonObject = {
        "name": function["name"],
        "input_schema": function.get("parameters") or {"type": "object", "properties": {}},
    }
    if function.get("description"):
        written["description"] = function["description"]
    if function.get("strict"):
        written["strict"] = True
        written["input_schema"] = narrow_schema(written["input_schema"])
    if tool.get("cache_control"):
        written["cache_control"] = tool["cache_control"]
    return written


def _tool_choice(choice: ChosenTools | None) -> MutableJsonObject:
    mode = "auto" if choice is None else choice.mode
    if choice is not None and mode == "named":
        return {"type": "tool", "name": choice.names[0]}
    return {"type": {"required": "any"}.get(mode, mode)}


def _write_thinking(target: Target, fields: ChatFields, body: MutableJsonObject, limit: int | None) -> None:
    """How much is thought, and the limit of the answer, which counts what is thought."""
    body["max_tokens"] = limit or target.wire.max_output_tokens or DEFAULT_OUTPUT_TOKENS
    given, effort = fields.settings("thinking"), fields.word("reasoning_effort")
    if given is not None:
        body["thinking"] = given
        budget = given.get("budget_tokens")
        if limit is None and isinstance(budget, int):
            body["max_tokens"] += budget
        if effort is not None and effort in EFFORTS and target.wire.thinking == "effort":
            body["output_config"] = {"effort": EFFORTS[effort]}
        return
    if effort is None:
        return
    if "reasoning" not in target.abilities:
        if effort in ("none", "minimal"):
            return
        raise unsupported(target, "reasoning_effort", "its abilities do not name reasoning")
    if effort == "none":
        body["thinking"] = {"type": "disabled"}
    elif effort not in EFFORTS:
        raise unsupported(target, "reasoning_effort")
    elif target.wire.thinking == "effort":
        body["thinking"] = {"type": "adaptive", "display": "summarized"}
        body["output_config"] = {"effort": EFFORTS[effort]}
    else:
        _write_budget(target, body, limit, EFFORT_TOKENS[effort])


def _write_budget(target: Target, body: MutableJsonObject, limit: int | None, tokens: int) -> None:
    """At most half of the caller's own limit, so that there is room for an answer."""
    if limit is None:
        body["max_tokens"] += tokens
    else:
        tokens = min(tokens, limit // 2)
    if tokens < MIN_BUDGET_TOKENS:
        raise unsupported(target, "reasoning_effort", f"thinking takes {2 * MIN_BUDGET_TOKENS} tokens at least")
    if body.get("tool_choice", {}).get("type") in ("any", "tool"):
        raise unsupported(target, "tool_choice", "a model that thinks by a budget cannot be made to call a tool")
    body["thinking"] = {"type": "enabled", "budget_tokens": tokens}


def _write_format(target: Target, fields: ChatFields, body: MutableJsonObject) -> None:
    kind, schema = fields.response_format()
    if kind == "json_schema":
        format = {"type": "json_schema", "schema": narrow_schema(schema or {})}
        body["output_config"] = {**body.get("output_config", {}), "format": format}
    elif kind == "json_object":
        if body.get("tools"):
            raise unsupported(target, "response_format", "with tools it takes json_schema only")
        if body.get("thinking", {}).get("type") == "enabled":
            raise unsupported(target, "response_format", "a model that thinks by a budget takes json_schema only")
        body["tools"] = [
            {"name": _JSON_TOOL, "description": "The answer, a JSON object.", "input_schema": {"type": "object"}}
        ]
        body["tool_choice"] = {"type": "tool", "name": _JSON_TOOL, "disable_parallel_tool_use": True}


def _write_sampling(target: Target, fields: ChatFields, body: MutableJsonObject) -> None:
    """Newer versions of the API take none of them, not even with the value that is meant anyway."""
    refused = target.wire.refuses
    for name in _SAMPLING:
        value = fields.get(name)
        if value is None or (name in refused and value == 1):
            continue
        if name == "temperature" and value > 1:
            raise unsupported(target, name, f"{value:g} is more than 1, the highest there")
        body[name] = value


def _write_account(target: Target, fields: ChatFields, body: MutableJsonObject) -> None:
    user = fields.word("safety_identifier", "user")
    metadata = fields.settings("metadata") or {}
    other = next((name for name in metadata if name != "user_id"), None)
    if other is not None:
        raise unsupported(target, f"metadata.{other}", "there is only user_id")
    user = metadata.get("user_id") or user
    if user is not None:
        body["metadata"] = {"user_id": user}
    tier = fields.word("service_tier")
    if tier is not None:
        if tier not in _TIERS:
            raise unsupported(target, "service_tier", "it has auto and default")
        body["service_tier"] = _TIERS[tier]
