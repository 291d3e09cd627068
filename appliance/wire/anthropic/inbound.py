"""`POST /v1/messages`: Anthropic's body, checked field by field, as a chat."""

from collections.abc import Sequence
from typing import Final

from appliance.core.json_types import JsonObject
from appliance.errors import RequestError, Unsupported
from appliance.wire.anthropic.inbound_blocks import (
    read_assistant_message,
    read_cache_mark,
    read_system_message,
    read_user_messages,
)
from appliance.wire.anthropic.outbound import EFFORTS, MIN_BUDGET_TOKENS
from appliance.wire.chat_ir import (
    MAX_MESSAGES,
    MAX_STOPS,
    ChatBody,
    ChatMessage,
    ChatTool,
    check_tool_offered,
    effort_of_budget,
    function_tool,
    json_format,
)
from appliance.wire.json_schema import check_schema, is_strict_subset
from appliance.wire.strict_fields import StrictFields, check_tool_name, missing, read_model, wrong

_EFFORTS: Final = tuple(dict.fromkeys(EFFORTS.values()))
_ANY_TOKENS: Final = 10_000_000
"""Stands for the limit of an answer that is not asked for."""

_NO_SERVER_TOOLS: Final = "such tools are not run here; describe a tool of your own by name and input_schema"


def read_anthropic_chat(body: JsonObject) -> ChatBody:
    """Check a Messages body and translate it to a chat. Raises RequestError naming field, value and remedy."""
    return _read_chat(StrictFields(body), body)


def read_anthropic_count(body: JsonObject) -> ChatBody:
    """Check a body of `/v1/messages/count_tokens`: as for a message, without what an answer would need."""
    if body.get("stream"):
        raise wrong("stream", body["stream"], "a count is not streamed")
    return read_anthropic_chat({"max_tokens": _ANY_TOKENS, **body})


def _read_chat(given: StrictFields, body: JsonObject) -> ChatBody:
    chat: ChatBody = {"model": read_model(body)}
    given.accept("model")
    _refuse_unsupported(given)
    chat["messages"] = _messages(given)
    _sampling(given, chat)
    _tools(given, chat)
    _output(given, chat)
    metadata = given.object("metadata")
    if metadata is not None:
        user = metadata.text("user_id")
        metadata.finish()
        if user:
            chat["user"] = user
    if given.flag("stream"):
        chat["stream"] = True
    given.finish()
    return chat


def _refuse_unsupported(given: StrictFields) -> None:
    given.refuse("container", "there are no containers; leave it out")
    given.refuse("mcp_servers", "such servers are not called here; offer their tools yourself", allowed=([],))
    given.refuse("diagnostics", "no earlier message is kept; leave it out")
    given.refuse("inference_geo", "bind a request by the header x-appliance-residency: region:XX", allowed=("global",))
    given.refuse("speed", "there is one speed", allowed=("standard",))
    given.refuse("user_profile_id", "there are no user profiles; name the user in metadata.user_id")
    given.refuse("workspace_id", "there are no workspaces; leave it out")
    given.one_of("service_tier", ("auto", "standard_only"))
    _context_management(given)


def _context_management(given: StrictFields) -> None:
    """Edits that keep everything are none; others are for the one who keeps the conversation to make."""
    management = given.object("context_management")
    if management is None:
        return
    for index, row in enumerate(management.rows("edits", 0, 16, "edits") or ()):
        edit = StrictFields(row, f"context_management.edits[{index}]")
        kind, keep = edit.required_text("type"), edit.get("keep")
        if not kind.startswith("clear_thinking") or keep != "all":
            raise Unsupported(
                f"{edit.path} ({kind[:80]}) is not supported here: shorten the messages yourself", param=edit.path
            )
        edit.finish()
    management.finish()


def _messages(given: StrictFields) -> list[ChatMessage]:
    rows = given.rows("messages", 0, MAX_MESSAGES, "messages")
    if rows is None:
        raise missing("messages", 'it must be a list such as [{"role": "user", "content": "Hello"}]')
    if not rows:
        raise RequestError("messages is empty: give at least one message", param="messages")
    made: list[ChatMessage] = []
    system = given.get("system")
    if system is not None and system != []:
        made.append(read_system_message(system, "system"))
    called: set[str] = set()
    for index, row in enumerate(rows):
        made += _turn(StrictFields(row, f"messages[{index}]"), called)
    if made[-1]["role"] == "assistant":
        place = f"messages[{len(rows) - 1}]"
        raise Unsupported(
            f"{place} is the assistant's: an answer cannot be begun for the model here; end with the user's message",
            param=place,
        )
    mark = read_cache_mark(given)
    if mark is not None and not _is_marked(made[-1]):
        made[-1] = {**made[-1], "cache_control": mark}
    return made


def _is_marked(message: ChatMessage) -> bool:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    return "cache_control" in message or any("cache_control" in part for part in parts)


def _turn(message: StrictFields, called: set[str]) -> Sequence[ChatMessage]:
    role, content, path = message.get("role"), message.get("content"), message.at("content")
    message.finish()
    if content is None:
        raise missing(path, "it must be a string or a list of content blocks")
    if role == "user":
        return read_user_messages(content, path, called)
    if role == "assistant":
        return [read_assistant_message(content, path, called)]
    if role == "system":
        return [read_system_message(content, path)]
    raise message.wrong("role", "it must be user, assistant or system")


def _sampling(given: StrictFields, chat: ChatBody) -> None:
    limit = given.whole("max_tokens", 0)
    if limit is None:
        raise missing("max_tokens", "it must be the largest number of tokens to answer with")
    if limit == 0:
        raise Unsupported(
            "max_tokens is 0: caches are not filled beforehand here; ask for 1 or more", param="max_tokens"
        )
    chat["max_tokens"] = limit
    temperature, top_p = given.number("temperature", 0, 1), given.number("top_p", 0, 1)
    if temperature is not None:
        chat["temperature"] = temperature
    if top_p is not None:
        chat["top_p"] = top_p
    top_k = given.whole("top_k", 0)
    if top_k is not None:
        chat["top_k"] = top_k
    stops = given.texts("stop_sequences", MAX_STOPS)
    if stops:
        chat["stop"] = stops


def _tools(given: StrictFields, chat: ChatBody) -> None:
    rows = given.rows("tools", 0, 1024, "tools") or ()
    tools = [_tool(StrictFields(row, f"tools[{index}]")) for index, row in enumerate(rows)]
    if tools:
        chat["tools"] = tools
    choice = given.object("tool_choice")
    if choice is None:
        return
    kind = choice.one_of("type", ("auto", "any", "tool", "none"))
    if kind is None:
        raise missing("tool_choice.type", "it must be auto, any, tool or none")
    if not tools and kind != "none":
        raise RequestError("tool_choice is given without tools: give tools, or leave it out", param="tool_choice")
    if kind == "tool":
        name = check_tool_offered(choice.required_text("name"), tools, "tool_choice.name")
        chat["tool_choice"] = {"type": "function", "function": {"name": name}}
    elif tools:
        chat["tool_choice"] = "required" if kind == "any" else kind
    if choice.flag("disable_parallel_tool_use"):
        chat["parallel_tool_calls"] = False
    choice.finish()


def _tool(tool: StrictFields) -> ChatTool:
    kind = tool.get("type")
    if kind not in (None, "custom"):
        raise Unsupported(f"{tool.at('type')} is {str(kind)[:80]!r}: {_NO_SERVER_TOOLS}", param=tool.at("type"))
    name = check_tool_name(tool.get("name"), tool.at("name"))
    if tool.get("input_schema") is None:
        raise missing(tool.at("input_schema"), "it must be a JSON schema")
    schema = check_schema(tool.get("input_schema"), tool.at("input_schema"))
    made = function_tool(name, tool.text("description"), schema, strict=tool.flag("strict"))
    tool.refuse("defer_loading", "every tool is shown to the model", allowed=(False,))
    tool.refuse("allowed_callers", "tools are called by the model alone", allowed=(["direct"], []))
    tool.refuse("input_examples", "put examples into the description", allowed=([],))
    tool.flag("eager_input_streaming")
    mark = read_cache_mark(tool)
    tool.finish()
    return made if mark is None else {**made, "cache_control": mark}


def _output(given: StrictFields, chat: ChatBody) -> None:
    """Thinking and the form of the answer. `output_format` is the older place of `output_config.format`."""
    effort = _thinking(given, chat["max_tokens"])
    config = given.object("output_config")
    format = given.object("output_format")
    if config is not None:
        effort = config.one_of("effort", _EFFORTS) or effort
        format = config.object("format") or format
        config.refuse("task_budget", "set max_tokens")
        config.finish()
    if effort is not None:
        chat["reasoning_effort"] = effort
    if format is not None:
        if format.one_of("type", ("json_schema",)) is None:
            raise missing(format.at("type"), "it must be json_schema")
        schema = check_schema(format.get("schema"), format.at("schema"))
        chat["response_format"] = json_format(schema, strict=is_strict_subset(schema))
        format.accept("name")
        format.finish()


def _thinking(given: StrictFields, max_tokens: int) -> str | None:
    """How hard to think, in words: other dialects know no budgets."""
    thinking = given.object("thinking")
    if thinking is None:
        return None
    kind = thinking.one_of("type", ("enabled", "disabled", "adaptive"))
    if kind is None:
        raise missing("thinking.type", "it must be enabled, disabled or adaptive")
    thinking.one_of("display", ("summarized", "omitted"))
    budget = thinking.whole("budget_tokens", MIN_BUDGET_TOKENS)
    thinking.finish()
    if kind != "enabled":
        return "none" if kind == "disabled" else None
    if budget is None:
        raise missing("thinking.budget_tokens", f"it must be at least {MIN_BUDGET_TOKENS}")
    if budget >= max_tokens:
        raise thinking.wrong("budget_tokens", f"it must be less than max_tokens ({max_tokens})")
    return effort_of_budget(budget)
