"""`models/{model}:generateContent`: Gemini's body, checked field by field, as a chat."""

from collections.abc import Sequence
from typing import Final, Literal

from appliance.core.json_types import JsonObject, JsonSchema
from appliance.errors import RequestError, Unsupported
from appliance.wire.chat_ir import (
    MAX_CHOICES,
    MAX_STOPS,
    MAX_TOP_LOGPROBS,
    ChatBody,
    ChatTool,
    check_tool_offered,
    effort_of_budget,
    function_tool,
    json_format,
    json_text,
)
from appliance.wire.gemini.inbound_contents import read_contents
from appliance.wire.gemini.schema import convert_schema
from appliance.wire.json_schema import check_schema
from appliance.wire.strict_fields import StrictFields, check_tool_name, read_model, wrong

_NO_BLOCKING: Final = ("BLOCK_NONE", "OFF", "HARM_BLOCK_THRESHOLD_UNSPECIFIED")
_LEVELS: Final = ("THINKING_LEVEL_UNSPECIFIED", "MINIMAL", "LOW", "MEDIUM", "HIGH")
_WHOLES: Final[Sequence[tuple[str, Literal["max_completion_tokens", "n", "top_k", "seed"], int, int | None]]] = (
    ("maxOutputTokens", "max_completion_tokens", 1, None),
    ("candidateCount", "n", 1, MAX_CHOICES),
    ("topK", "top_k", 0, None),
    ("seed", "seed", -(2**63), 2**63 - 1),
)
"""(Gemini's field, chat's, least, most)"""
_NUMBERS: Final[
    Sequence[tuple[str, Literal["temperature", "top_p", "presence_penalty", "frequency_penalty"], int, int]]
] = (
    ("temperature", "temperature", 0, 2),
    ("topP", "top_p", 0, 1),
    ("presencePenalty", "presence_penalty", -2, 2),
    ("frequencyPenalty", "frequency_penalty", -2, 2),
)
_HOSTED: Final = "such tools are not run here; describe functions of your own in functionDeclarations"
_OF_COUNTS: Final = ("contents", "systemInstruction", "tools", "toolConfig", "generationConfig", "model")


def read_gemini_chat(body: JsonObject, model: str | None = None, *, stream: bool = False) -> ChatBody:
    """Check a body sent for `model` (None: the body names it) and translate it to a chat.

    Raises RequestError naming field, value and remedy.
    """
    given = StrictFields(body, snake=True)
    chat = _read_chat(given, model if model is not None else _named(given))
    if stream:
        chat["stream"] = True
    return chat


def read_gemini_count(body: JsonObject, model: str | None = None) -> ChatBody:
    """Check a body of `:countTokens`: contents alone, or a whole request as `generateContentRequest`."""
    given = StrictFields(body, snake=True)
    inner = given.mapping("generateContentRequest")
    if inner is None:
        inner = {name: given.get(name) for name in _OF_COUNTS if given.get(name) is not None}
    given.finish()
    return read_gemini_chat(inner, model)


def _named(given: StrictFields) -> str:
    name = given.text("model")
    return "auto" if name is None else read_model({"model": name.removeprefix("models/")})


def _read_chat(given: StrictFields, model: str) -> ChatBody:
    chat: ChatBody = {"model": read_model({"model": model})}
    given.accept("model")
    chat["messages"] = read_contents(given.get("contents"), given.get("systemInstruction"))
    given.refuse("cachedContent", "no contents are kept here; send them")
    given.refuse("store", "nothing is kept here", allowed=(False,))
    given.refuse("labels", "requests are not labelled here; use the header x-appliance-tag", allowed=({},))
    given.one_of("serviceTier", ("unspecified", "standard", "SERVICE_TIER_UNSPECIFIED", "STANDARD"))
    _safety(given)
    _tools(given, chat)
    config = given.object("generationConfig")
    if config is not None:
        _sampling(config, chat)
        _format(config, chat)
        _thinking(config, chat)
        _refuse_other_media(config)
        config.finish()
    given.finish()
    return chat


def _safety(given: StrictFields) -> None:
    """Nothing is filtered here: a request for a filter is refused, one for no filter is granted."""
    for index, row in enumerate(given.rows("safetySettings", 0, 64, "settings") or ()):
        setting = StrictFields(row, f"safetySettings[{index}]", snake=True)
        setting.required_text("category")
        setting.accept("method")
        threshold = setting.text("threshold")
        if threshold is not None and threshold not in _NO_BLOCKING:
            place = setting.at("threshold")
            raise Unsupported(
                f"{place} is {threshold[:80]!r}: nothing is filtered here; leave it out, or send BLOCK_NONE",
                param=place,
            )
        setting.finish()


def _tools(given: StrictFields, chat: ChatBody) -> None:
    tools: list[ChatTool] = []
    for index, row in enumerate(given.rows("tools", 0, 128, "tools") or ()):
        tool = StrictFields(row, f"tools[{index}]", snake=True)
        declared = tool.rows("functionDeclarations", 0, 1024, "functions")
        for name, value in row.items():
            if value is not None and name not in ("functionDeclarations", "function_declarations"):
                place = tool.at(str(name)[:80])
                raise Unsupported(f"{place} is not supported here: {_HOSTED}", param=place)
        for position, one in enumerate(declared or ()):
            tools.append(_function(StrictFields(one, f"{tool.at('functionDeclarations')}[{position}]", snake=True)))
    tools, choice = _choice(given, tools)
    if tools:
        chat["tools"] = tools
        if choice is not None:
            chat["tool_choice"] = choice


def _function(declared: StrictFields) -> ChatTool:
    name = check_tool_name(declared.get("name"), declared.at("name"))
    plain, open_api = declared.get("parametersJsonSchema"), declared.get("parameters")
    if plain is not None and open_api is not None:
        place = declared.at("parametersJsonSchema")
        raise RequestError(f"{place} is given beside parameters: leave one of them out", param=place)
    schema = None
    if plain is not None:
        schema = check_schema(plain, declared.at("parametersJsonSchema"))
    elif open_api is not None:
        path = declared.at("parameters")
        schema = check_schema(convert_schema(open_api, path), path)
    declared.refuse("behavior", "functions are waited for", allowed=("UNSPECIFIED", "BLOCKING"))
    description = declared.text("description")
    for field in ("response", "responseJsonSchema"):
        returned = declared.mapping(field)
        if returned:  # no other dialect has a place for it, and the model is to read it
            description = f"{description or name}\nReturns: {json_text(returned)}"
    declared.finish()
    return function_tool(name, description, schema)


def _choice(given: StrictFields, tools: list[ChatTool]) -> tuple[list[ChatTool], str | None]:
    """The functions that may be called, and whether one must be."""
    config = given.object("toolConfig")
    if config is None:
        return tools, None
    config.refuse("retrievalConfig", "nothing is retrieved here")
    config.refuse("includeServerSideToolInvocations", "no tools are run here", allowed=(False,))
    calling = config.object("functionCallingConfig")
    config.finish()
    if calling is None:
        return tools, None
    mode = calling.one_of("mode", ("MODE_UNSPECIFIED", "AUTO", "ANY", "NONE", "VALIDATED")) or "AUTO"
    names = calling.texts("allowedFunctionNames", 1024)
    calling.refuse("streamFunctionCallArguments", "calls are given whole", allowed=(False,))
    calling.finish()
    path = calling.at("allowedFunctionNames")
    if names and mode not in ("ANY", "VALIDATED"):
        raise RequestError(f"{path} is given with mode {mode}: it goes with ANY or VALIDATED", param=path)
    for index, name in enumerate(names):
        check_tool_offered(name, tools, f"{path}[{index}]")
    if mode == "ANY" and not tools:
        raise RequestError(f"{calling.at('mode')} is ANY without tools: give tools", param=calling.at("mode"))
    left = [tool for tool in tools if not names or tool["function"]["name"] in names]
    return left, {"ANY": "required", "NONE": "none", "AUTO": "auto", "VALIDATED": "auto"}.get(mode)


def _sampling(config: StrictFields, chat: ChatBody) -> None:
    for name, ours, least, most in _WHOLES:
        whole = config.whole(name, least, most)
        if whole is not None:
            chat[ours] = whole
    for number_name, our_number, low, high in _NUMBERS:
        number = config.number(number_name, low, high)
        if number is not None:
            chat[our_number] = number
    stops = config.texts("stopSequences", MAX_STOPS)
    if stops:
        chat["stop"] = stops
    top = config.whole("logprobs", 0, MAX_TOP_LOGPROBS)
    if config.flag("responseLogprobs"):
        chat["logprobs"] = True
        chat["top_logprobs"] = top or 0
    elif top is not None:
        raise RequestError(
            f"{config.at('logprobs')} is given without responseLogprobs: true", param=config.at("logprobs")
        )


def _format(config: StrictFields, chat: ChatBody) -> None:
    kind = config.text("responseMimeType")
    if kind not in (None, "", "text/plain", "application/json"):
        place = config.at("responseMimeType")
        raise Unsupported(f"{place} is {kind!r:.80}: it must be text/plain or application/json", param=place)
    given: list[tuple[JsonSchema, str]] = []
    if config.get("responseSchema") is not None:
        path = config.at("responseSchema")
        given.append((convert_schema(config.get("responseSchema"), path), path))
    for name in ("responseJsonSchema", "_responseJsonSchema"):
        if config.get(name) is not None:
            given.append((config.get(name), config.at(name)))
    if len(given) > 1:
        raise RequestError(f"{given[1][1]} is given beside {given[0][1]}: leave one out", param=given[1][1])
    if given and kind != "application/json":
        raise RequestError(
            f"{given[0][1]} is given without responseMimeType: set that to application/json", param=given[0][1]
        )
    if given:
        chat["response_format"] = json_format(check_schema(*given[0]))
    elif kind == "application/json":
        chat["response_format"] = {"type": "json_object"}


def _thinking(config: StrictFields, chat: ChatBody) -> None:
    thinking = config.object("thinkingConfig")
    if thinking is None:
        return
    thinking.flag("includeThoughts")
    budget = thinking.whole("thinkingBudget", -1)
    level = thinking.one_of("thinkingLevel", _LEVELS)
    thinking.finish()
    if level not in (None, "THINKING_LEVEL_UNSPECIFIED"):
        chat["reasoning_effort"] = str(level).lower()
    elif budget is not None and budget >= 0:  # -1: as the model sees fit
        chat["reasoning_effort"] = effort_of_budget(budget) if budget else "none"


def _refuse_other_media(config: StrictFields) -> None:
    modalities = config.rows("responseModalities", 0, 8, "modalities")
    for index, one in enumerate(modalities or ()):
        if one not in ("TEXT", "MODALITY_UNSPECIFIED"):
            raise wrong(f"{config.at('responseModalities')}[{index}]", one, "answers are TEXT here")
    config.refuse("mediaResolution", "images are passed on as they are", allowed=("MEDIA_RESOLUTION_UNSPECIFIED",))
    for name in ("speechConfig", "imageConfig", "audioTranscriptionConfig"):
        config.refuse(name, "answers are text here")
    config.refuse("enableEnhancedCivicAnswers", "there are no such answers", allowed=(False,))
    config.refuse("audioTimestamp", "sound is not read here", allowed=(False,))
    config.refuse("continuationToken", "nothing is kept here")
