"""`POST /v1/responses`: OpenAI's newer body, checked field by field, as a chat. Nothing is kept between requests."""

from typing import Final, Literal

from appliance.core.json_types import JsonObject
from appliance.errors import RequestError, Unsupported
from appliance.wire.chat_ir import (
    MAX_TOP_LOGPROBS,
    REASONING_EFFORTS,
    ChatBody,
    ChatTool,
    ToolChoice,
    check_tool_offered,
    function_tool,
    json_format,
)
from appliance.wire.json_schema import check_schema
from appliance.wire.responses.inbound_items import read_items
from appliance.wire.responses.outbound import ENCRYPTED, LOGPROBS
from appliance.wire.strict_fields import StrictFields, check_tool_name, missing, read_model

MAX_METADATA: Final = 16

_CARRIED: Final[tuple[Literal["user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"], ...]] = (
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
_KEPT_NOWHERE: Final = "nothing is kept between requests here; send the whole conversation in input"
_HOSTED: Final = "such tools are not run here; describe a function of your own"


def read_responses_chat(body: JsonObject) -> ChatBody:
    """Check a Responses body and translate it to a chat. Raises RequestError naming field, value and remedy."""
    return _read_chat(StrictFields(body), body)


def read_responses_count(body: JsonObject) -> ChatBody:
    """Check a body of `/v1/responses/input_tokens`."""
    return read_responses_chat({name: value for name, value in body.items() if name != "stream"})


def _read_chat(given: StrictFields, body: JsonObject) -> ChatBody:
    chat: ChatBody = {"model": read_model(body)}
    given.accept("model")
    _refuse_unsupported(given)
    chat["messages"] = read_items(given.get("input"), given.text("instructions"))
    _sampling(given, chat)
    _tools(given, chat)
    _text(given, chat)
    _reasoning(given, chat)
    for name in _CARRIED:
        value = given.text(name)
        if value is not None:
            chat[name] = value
    if given.flag("stream"):
        chat["stream"] = True
    given.finish()
    return chat


def _refuse_unsupported(given: StrictFields) -> None:
    given.refuse("previous_response_id", _KEPT_NOWHERE)
    given.refuse("conversation", _KEPT_NOWHERE)
    given.refuse("background", "answers are given while the caller waits; leave it out", allowed=(False,))
    given.refuse("store", "nothing is kept here; leave it out or send false", allowed=(False,))
    given.refuse("prompt", "no prompts are kept here; send instructions and input")
    given.refuse("context_management", "shorten the input yourself", allowed=([],))
    given.refuse("max_tool_calls", "it is about tools that are run here, and none are")
    given.refuse("moderation", "nothing is moderated here")
    given.refuse("access_programs", "there are none")
    given.refuse("image", "images are passed on as they are")
    given.one_of("truncation", ("auto", "disabled"))
    given.one_of("service_tier", ("auto", "default"))
    given.mapping("prompt_cache_options")
    options = given.object("stream_options")
    if options is not None:
        options.refuse("include_obfuscation", "events are not padded here", allowed=(False,))
        options.finish()
    _check_metadata(given)


def _check_metadata(given: StrictFields) -> None:
    metadata = given.mapping("metadata") or {}
    if len(metadata) > MAX_METADATA or not all(isinstance(value, str) for value in metadata.values()):
        raise given.wrong("metadata", f"it must hold at most {MAX_METADATA} strings")


def _sampling(given: StrictFields, chat: ChatBody) -> None:
    limit = given.whole("max_output_tokens", 1)
    if limit is not None:
        chat["max_completion_tokens"] = limit
    temperature, top_p = given.number("temperature", 0, 2), given.number("top_p", 0, 1)
    if temperature is not None:
        chat["temperature"] = temperature
    if top_p is not None:
        chat["top_p"] = top_p
    include = given.texts("include", 20)
    for index, one in enumerate(include):
        if one not in (LOGPROBS, ENCRYPTED):
            place = f"include[{index}]"
            raise Unsupported(f"{place} is {one[:80]!r}: only {LOGPROBS} and {ENCRYPTED} can be told here", param=place)
    top = given.whole("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if LOGPROBS in include or top:
        chat["logprobs"] = True
        chat["top_logprobs"] = top or 0


def _tools(given: StrictFields, chat: ChatBody) -> None:
    rows = given.rows("tools", 0, 1024, "tools") or ()
    tools = [_tool(StrictFields(row, f"tools[{index}]")) for index, row in enumerate(rows)]
    parallel = given.flag("parallel_tool_calls")
    tools, choice = _choice(given, tools)
    if tools:
        chat["tools"] = tools
        if choice is not None:
            chat["tool_choice"] = choice
        if parallel is not None:
            chat["parallel_tool_calls"] = parallel


def _tool(tool: StrictFields) -> ChatTool:
    kind = tool.get("type")
    if kind != "function":
        if not isinstance(kind, str):
            raise tool.wrong("type", "it must be function")
        raise Unsupported(f"{tool.at('type')} is {kind[:80]!r}: {_HOSTED}", param=tool.at("type"))
    name = check_tool_name(tool.get("name"), tool.at("name"))
    schema = tool.get("parameters")
    if schema is not None:
        check_schema(schema, tool.at("parameters"))
    tool.refuse("defer_loading", "every tool is shown to the model", allowed=(False,))
    tool.refuse("allowed_callers", "tools are called by the model alone", allowed=(["direct"], []))
    tool.refuse("output_schema", "say in the description what it returns")
    made = function_tool(name, tool.text("description"), schema, strict=tool.flag("strict"))
    tool.finish()
    return made


def _choice(given: StrictFields, tools: list[ChatTool]) -> tuple[list[ChatTool], ToolChoice | None]:
    """The tools that may be called, and `tool_choice` in chat's words."""
    value = given.get("tool_choice")
    if value is None or isinstance(value, str):
        choice = given.one_of("tool_choice", ("none", "auto", "required"))
        if choice == "required" and not tools:
            raise RequestError("tool_choice is 'required' without tools: give tools", param="tool_choice")
        return tools, choice
    chosen = StrictFields(value, "tool_choice")
    kind = chosen.get("type")
    if kind == "function":
        name = check_tool_offered(chosen.required_text("name"), tools, "tool_choice.name")
        chosen.finish()
        return tools, {"type": "function", "function": {"name": name}}
    if kind == "allowed_tools":
        mode = chosen.one_of("mode", ("auto", "required")) or "auto"
        names = set()
        for index, row in enumerate(chosen.rows("tools", 1, 1024, "tools") or ()):
            tool = StrictFields(row, f"tool_choice.tools[{index}]")
            tool.one_of("type", ("function",))
            names.add(check_tool_offered(tool.required_text("name"), tools, tool.at("name")))
            tool.finish()
        chosen.finish()
        return [tool for tool in tools if tool["function"]["name"] in names], mode
    if not isinstance(kind, str):
        raise chosen.wrong("type", "it must be function or allowed_tools")
    raise Unsupported(f"tool_choice.type is {kind[:80]!r}: {_HOSTED}", param="tool_choice.type")


def _text(given: StrictFields, chat: ChatBody) -> None:
    text = given.object("text")
    if text is None:
        return
    verbosity = text.one_of("verbosity", ("low", "medium", "high"))
    if verbosity is not None:
        chat["verbosity"] = verbosity
    format = text.object("format")
    text.finish()
    if format is None:
        return
    kind = format.one_of("type", ("text", "json_object", "json_schema"))
    if kind is None:
        raise missing("text.format.type", "it must be text, json_object or json_schema")
    if kind == "json_object":
        chat["response_format"] = {"type": "json_object"}
    elif kind == "json_schema":
        schema = check_schema(format.get("schema"), "text.format.schema")
        chat["response_format"] = json_format(
            schema,
            name=check_tool_name(format.get("name"), "text.format.name"),
            strict=format.flag("strict"),
            description=format.text("description"),
        )
    format.finish()


def _reasoning(given: StrictFields, chat: ChatBody) -> None:
    reasoning = given.object("reasoning")
    if reasoning is None:
        return
    effort = reasoning.one_of("effort", REASONING_EFFORTS)
    if effort is not None:
        chat["reasoning_effort"] = effort
    for name in ("summary", "generate_summary"):
        reasoning.one_of(name, ("auto", "concise", "detailed"))
    reasoning.refuse("mode", "there is one mode", allowed=("standard",))
    reasoning.refuse("context", "all reasoning in input is given to the model", allowed=("auto", "all_turns"))
    reasoning.finish()
