"""A chat as a request of Gemini's generateContent or streamGenerateContent, as the official SDK types them. Chat only.

Beyond OpenAI's own fields these are carried over where they are given: `top_k`, and Google's `extra_body`-style
`thinking_config`, `safety_settings` and `cached_content` in snake case, as its OpenAI-compatible endpoint takes them
under `extra_body.google`.
"""

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

from appliance.core import Target, UpstreamCall
from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.errors import Unsupported
from appliance.wire.chat_fields import ChatFields, unsupported
from appliance.wire.chat_ir import EFFORT_TOKENS, ToolFunction
from appliance.wire.dialect import CHAT_PATH, WireRequest, make_wire_request
from appliance.wire.gemini.outbound_contents import write_contents
from appliance.wire.strict_fields import camel_name

_PLAIN: Final[Mapping[str, str]] = {
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
    "n": "candidateCount",
    "seed": "seed",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
}
_LEVELS: Final[Mapping[str, str]] = {
    "none": "MINIMAL",
    "minimal": "MINIMAL",
    "low": "LOW",
    "medium": "MEDIUM",
    "high": "HIGH",
    "xhigh": "XHIGH",
    "max": "XHIGH",
}
_TIERS: Final[Mapping[str, str]] = {"default": "standard", "flex": "flex", "priority": "priority"}
_MAX_STOPS: Final = 5
_INT32: Final = range(-(2**31), 2**31)
_MODES: Final[Mapping[str, str]] = {"auto": "AUTO", "none": "NONE", "required": "ANY", "named": "ANY"}


def write_gemini_request(target: Target, outgoing: UpstreamCall, *, stream: bool, salt: str) -> WireRequest:
    """Raises Unsupported for another path than chat, or the first field that cannot be carried over; RequestError."""
    if outgoing.path != CHAT_PATH:
        raise Unsupported(f"{target.name} speaks Gemini's generateContent, which has no {outgoing.path}", param="model")
    body = write_content_body(target, outgoing.body)
    return make_wire_request(target, outgoing, write_path(target, stream=stream), body)


def write_path(target: Target, *, stream: bool) -> str:
    """The path below the target's address, with its query."""
    verb = "streamGenerateContent" if stream else "generateContent"
    query = "&".join(part for part in ("alt=sse" if stream else "", target.wire.query) if part)
    name = quote(target.model.removeprefix("models/"), safe="/")
    return f"/models/{name}:{verb}" + (f"?{query}" if query else "")


def write_content_body(target: Target, given: JsonObject) -> MutableJsonObject:
    """The body of `:generateContent`. Raises Unsupported for the first field that cannot be carried over."""
    fields = ChatFields(target, given)
    body = write_contents(target, fields.messages())
    _write_tools(target, fields, body)
    settings = _settings(target, fields)
    _write_format(fields, settings)
    _write_thinking(target, fields, settings)
    _write_google(target, fields, body, settings)
    _write_account(target, fields, body)
    fields.accept("model", "stream", "stream_options", "user", "safety_identifier")
    fields.finish()
    if settings:
        body["generationConfig"] = settings
    return body


def _settings(target: Target, fields: ChatFields) -> MutableJsonObject:
    settings: MutableJsonObject = {
        theirs: value for ours, theirs in _PLAIN.items() if (value := fields.get(ours)) is not None
    }
    if settings.get("seed") is not None and settings["seed"] not in _INT32:
        raise unsupported(target, "seed", "it has 32 bits")
    limit = fields.first("max_completion_tokens", "max_tokens") or target.wire.max_output_tokens
    if limit is not None:
        settings["maxOutputTokens"] = limit
    stops = fields.stops()
    if len(stops) > _MAX_STOPS:
        raise unsupported(target, "stop", f"it takes {_MAX_STOPS} stop sequences at most")
    if stops:
        settings["stopSequences"] = stops
    if fields.get("logprobs"):
        settings["responseLogprobs"] = True
        top = fields.get("top_logprobs")
        if top:
            settings["logprobs"] = top
    return settings


def _write_tools(target: Target, fields: ChatFields, body: MutableJsonObject) -> None:
    tools = fields.tools()
    choice = fields.tool_choice()
    is_parallel = fields.get("parallel_tool_calls")
    if not tools:
        return
    if is_parallel is False:
        raise unsupported(target, "parallel_tool_calls", "it cannot be kept from calling several tools at once")
    if choice is not None and choice.names and choice.mode == "auto":
        tools = [tool for tool in tools if tool["function"]["name"] in choice.names]
    body["tools"] = [{"functionDeclarations": [_declaration(tool["function"]) for tool in tools]}]
    if choice is not None:
        calling: MutableJsonObject = {"mode": _MODES[choice.mode]}
        if choice.names and choice.mode in ("required", "named"):
            calling["allowedFunctionNames"] = list(choice.names)
        body["toolConfig"] = {"functionCallingConfig": calling}


def _declaration(function: ToolFunction) -> JsonObject:
    """Gemini constrains arguments to their schema anyway, so `strict` needs no field."""
    written: MutableJsonObject = {"name": function["name"]}
    if function.get("description"):
        written["description"] = function["description"]
    parameters = function.get("parameters")
    if isinstance(parameters, Mapping) and parameters.get("properties", True):
        written["parametersJsonSchema"] = parameters
    return written


def _write_format(fields: ChatFields, settings: MutableJsonObject) -> None:
    kind, schema = fields.response_format()
    if kind != "text":
        settings["responseMimeType"] = "application/json"
    if schema:
        settings["responseJsonSchema"] = {name: value for name, value in schema.items() if name != "$schema"}


def _write_thinking(target: Target, fields: ChatFields, settings: MutableJsonObject) -> None:
    effort = fields.word("reasoning_effort")
    if effort is None:
        return
    if "reasoning" not in target.abilities:
        if effort in ("none", "minimal"):
            return
        raise unsupported(target, "reasoning_effort", "its abilities do not name reasoning")
    if effort not in _LEVELS:
        raise unsupported(target, "reasoning_effort")
    thinking: MutableJsonObject = {"includeThoughts": effort != "none"}
    if target.wire.thinking == "effort":
        thinking["thinkingLevel"] = _LEVELS[effort]
    else:
        thinking["thinkingBudget"] = 0 if effort == "none" else min(EFFORT_TOKENS[effort], EFFORT_TOKENS["high"])
    settings["thinkingConfig"] = thinking


def _write_google(target: Target, fields: ChatFields, body: MutableJsonObject, settings: MutableJsonObject) -> None:
    """Gemini's own settings, under the name that Google's OpenAI-compatible endpoint has for them."""
    extra = fields.get("extra_body")
    if extra is None:
        return
    google = extra.get("google") if isinstance(extra, Mapping) else None
    if not isinstance(google, Mapping) or len(extra) != 1:
        raise unsupported(target, "extra_body", "only extra_body.google is known")
    for name, value in google.items():
        match name:
            case "thinking_config":
                settings["thinkingConfig"] = _camel(value)
            case "safety_settings":
                body["safetySettings"] = _camel(value)
            case "cached_content":
                body["cachedContent"] = value
            case _:
                raise unsupported(target, f"extra_body.google.{name}")


def _camel(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {camel_name(name): _camel(part) for name, part in value.items()}
    return [_camel(part) for part in value] if isinstance(value, list) else value


def _write_account(target: Target, fields: ChatFields, body: MutableJsonObject) -> None:
    tier = fields.word("service_tier")
    if tier is not None and tier != "auto":
        if tier not in _TIERS:
            raise unsupported(target, "service_tier", "it has auto, default, flex and priority")
        body["serviceTier"] = _TIERS[tier]
    labels = fields.settings("metadata")
    if labels:
        body["labels"] = labels
