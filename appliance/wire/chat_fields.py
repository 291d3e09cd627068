"""Carrying a chat request over into another dialect, field by field: what is not carried is refused by its name."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import orjson

from appliance.core import Target
from appliance.core.json_types import JsonObject, JsonSchema, MutableJsonObject
from appliance.errors import RequestError, Unsupported
from appliance.wire.chat_ir import TEXT_PARTS, CalledFunction, ChatMessage, ChatTool, ContentPart, ToolCall
from appliance.wire.strict_fields import StrictFields

HINTS: Final = frozenset(
    {
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "prompt_cache_breakpoint",
        "cache_control",
        "cache_salt",
    }
)
"""They make an answer cheaper, never another one: left out where a dialect has nothing like them."""

HARMLESS: Final[Mapping[str, tuple[Any, ...]]] = {
    "n": (1,),
    "temperature": (1,),
    "top_p": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    "store": (False,),
    "verbosity": ("medium",),
    "service_tier": ("auto", "default"),
    "stream": (True, False),
    "tools": ([],),
    "functions": ([],),
    "metadata": ({},),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "ignore_eos": (False,),
}
"""Values that say what happens anyway."""

INSTRUCTING_ROLES: Final = frozenset({"system", "developer"})

DEFAULT_OUTPUT_TOKENS: Final = 8_192
"""Where the dialect wants a limit and neither the caller nor the model's row has one."""


def unsupported(target: Target, param: str, why: str = "") -> Unsupported:
    return Unsupported(f"{target.name} cannot be given {param}{': ' + why if why else ''}", param=param)


def drop_left_out(target: Target, body: JsonObject) -> MutableJsonObject:
    """The body without what the operator wants left out for this model."""
    names = target.wire.leaves_out
    return {name: value for name, value in body.items() if name not in names}


def dump_body(target: Target, body: JsonObject) -> bytes:
    try:
        return orjson.dumps(body)
    except (orjson.JSONEncodeError, TypeError, ValueError) as error:
        raise RequestError(f"the request cannot be written as JSON for {target.name}: {error}") from error


class ChosenTools(NamedTuple):
    """What `tool_choice` asks for."""

    mode: str
    """auto, none, required, or named."""
    names: tuple[str, ...] = ()
    """The tools that may be called; empty: all."""


class ChatFields(StrictFields):
    """The fields of a chat body for `target`. `finish` refuses those that were not read."""

    __slots__ = ("target",)

    def __init__(self, target: Target, body: JsonObject) -> None:
        given = {name: value for name, value in drop_left_out(target, body).items() if name not in HINTS}
        super().__init__(given)
        self.target = target
        for name, value in given.items():
            if value is not None and name in target.wire.refuses and not is_harmless(name, value):
                raise unsupported(target, name)

    def first(self, *names: str) -> Any:
        """The first of several names for the same that is given."""
        given = [self.get(name) for name in names]
        return next((value for value in given if value is not None), None)

    def word(self, *names: str) -> str | None:
        """As `first`. Raises RequestError where it is no string."""
        return require_text(self.first(*names), names[0])

    def settings(self, name: str) -> JsonObject | None:
        """Raises RequestError where the field is no object."""
        return require_object(self.get(name), name)

    def messages(self) -> Sequence[ChatMessage]:
        return self.get("messages") or ()

    def stops(self) -> list[str]:
        stops = self.get("stop") or ()
        return [stops] if isinstance(stops, str) else list(stops)

    def response_format(self) -> tuple[str, JsonSchema | None]:
        """(kind, schema): text, json_object or json_schema."""
        given = self.get("response_format")
        if not isinstance(given, Mapping):
            return "text", None
        kind = str(given.get("type"))
        if kind == "json_schema":
            wrapper = given.get("json_schema")
            schema = wrapper.get("schema") if isinstance(wrapper, Mapping) else None
            return kind, schema if isinstance(schema, Mapping) else {}
        return kind, None

    def tools(self) -> list[ChatTool]:
        """Raises Unsupported for the first that is not a function, or has more fields than functions have."""
        known = {"name", "description", "parameters", "strict"}
        tools = self.get("tools") or ()
        for index, tool in enumerate(tools):
            if not isinstance(tool, Mapping) or tool.get("type") != "function":
                raise unsupported(self.target, f"tools[{index}]", "only functions can be offered")
            for name, value in tool["function"].items():
                if name not in known and value is not None:
                    raise unsupported(self.target, f"tools[{index}].function.{name}")
        return list(tools)

    def tool_choice(self) -> ChosenTools | None:
        """Raises Unsupported where it is about something other than functions."""
        value = self.get("tool_choice")
        if value is None:
            return None
        if value in ("auto", "none", "required"):
            return ChosenTools(value)
        kind = value.get("type") if isinstance(value, Mapping) else None
        inner = value.get(kind) if isinstance(kind, str) else None
        if kind == "function" and isinstance(inner, Mapping) and isinstance(inner.get("name"), str):
            return ChosenTools("named", (inner["name"],))
        if kind == "allowed_tools" and isinstance(inner, Mapping):
            tools = inner.get("tools")
            names = tuple(self._allowed_name(tool) for tool in (tools if isinstance(tools, list) else ()))
            return ChosenTools("required" if inner.get("mode") == "required" else "auto", names)
        raise unsupported(self.target, "tool_choice")

    def _allowed_name(self, tool: object) -> str:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            raise unsupported(self.target, "tool_choice")
        return name

    def _refuse_unread(self, name: str, value: Any) -> None:
        if not is_harmless(name, value):
            raise unsupported(self.target, name)


def is_harmless(name: str, value: object) -> bool:
    """Whether this field says no more than what happens without it."""
    return any(value == one and isinstance(value, bool) is isinstance(one, bool) for one in HARMLESS.get(name, ()))


def require_text(value: Any, param: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise RequestError(f"{param} must be a string", param=param)
    return value


def require_object(value: Any, param: str) -> JsonObject | None:
    if value is not None and not isinstance(value, Mapping):
        raise RequestError(f"{param} must be an object", param=param)
    return value


def own_blocks(message: ChatMessage, kinds: frozenset[str]) -> Iterator[MutableJsonObject]:
    """Those of the message's `thinking_blocks` that are of these kinds; others are another provider's."""
    blocks = message.get("thinking_blocks")
    for block in blocks if isinstance(blocks, list) else ():
        if isinstance(block, Mapping) and isinstance(block.get("type"), str) and block["type"] in kinds:
            # Clients that put a stream together keep the index of its deltas.
            yield {name: value for name, value in block.items() if name != "index"}


def message_role(target: Target, message: ChatMessage, path: str) -> str | None:
    """Who speaks. Raises Unsupported for what stands on a message and no dialect but OpenAI's chat has."""
    role = message.get("role")
    if message.get("name") and role != "tool":
        raise unsupported(target, f"{path}.name", "messages have no names there")
    for name in ("function_call", "audio"):
        if message.get(name):
            raise unsupported(target, f"{path}.{name}")
    return role


def called_function(target: Target, call: ToolCall, where: str) -> CalledFunction:
    """The function of a tool call. Raises Unsupported where something else was called, RequestError without a name."""
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise unsupported(target, where, "only functions can be called")
    if not isinstance(function.get("name"), str):
        raise RequestError(f"{where}.function.name must be a string", param=where)
    return function


def call_arguments(function: CalledFunction, param: str) -> JsonObject:
    """A tool call's arguments as an object. Raises RequestError."""
    text = function.get("arguments") or "{}"
    try:
        value = orjson.loads(text) if isinstance(text, str) else text
    except orjson.JSONDecodeError as error:
        raise RequestError(f"{param}.function.arguments is not JSON: {error}", param=param) from error
    if not isinstance(value, dict):
        raise RequestError(f"{param}.function.arguments must be a JSON object", param=param)
    return value


def content_parts(message: ChatMessage) -> Sequence[ContentPart]:
    content = message.get("content")
    if content is None:
        return ()
    return ({"type": "text", "text": content},) if isinstance(content, str) else content


def part_text(part: ContentPart) -> str | None:
    """The text of a part that is nothing but text."""
    kind = part.get("type")
    value = part.get("refusal") if kind == "refusal" else part.get("text")
    return value if kind in TEXT_PARTS and isinstance(value, str) else None


def image_address(part: ContentPart, param: str) -> str:
    """The URL of an `image_url` part, in either of its two shapes."""
    image: object = part.get("image_url")
    url = image.get("url") if isinstance(image, Mapping) else image
    if not isinstance(url, str) or not url:
        raise RequestError(f"{param}.image_url.url must be a URL", param=f"{param}.image_url")
    return url
