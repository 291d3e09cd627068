"""Carrying a chat request over into another dialect, field by field: what is not carried is refused by its name."""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import orjson

from appliance.core import Target
from appliance.errors import RequestError, Unsupported

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

EFFORT_TOKENS: Final[Mapping[str, int]] = {
    "minimal": 1_024,
    "low": 2_048,
    "medium": 8_192,
    "high": 24_576,
    "xhigh": 32_768,
    "max": 32_768,
}
"""For models that are told how much to think by a number of tokens. `high` is the most that every such Gemini takes."""

DEFAULT_OUTPUT_TOKENS: Final = 8_192
"""Where the dialect wants a limit and neither the caller nor the model's row has one."""

_DATA_URL: Final = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w=.+-]+)*),", re.ASCII)


def unsupported(target: Target, param: str, why: str = "") -> Unsupported:
    return Unsupported(f"{target.name} cannot be given {param}{': ' + why if why else ''}", param=param)


def left_out(target: Target, body: Mapping[str, Any]) -> dict[str, Any]:
    """The body without what the operator wants left out for this model."""
    names = target.wire.leaves_out
    return {name: value for name, value in body.items() if name not in names}


def body_bytes(target: Target, body: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(body)
    except (orjson.JSONEncodeError, TypeError, ValueError) as error:
        raise RequestError(f"the request cannot be written as JSON for {target.name}: {error}") from error


class ChatFields:
    """The fields of a chat body. Each is taken once; `finish` refuses those that nobody took."""

    def __init__(self, target: Target, body: Mapping[str, Any]) -> None:
        self.target = target
        refuses = target.wire.refuses
        self._left = {
            name: value for name, value in left_out(target, body).items() if value is not None and name not in HINTS
        }
        for name, value in self._left.items():
            if name in refuses and not is_harmless(name, value):
                raise unsupported(target, name)

    def take(self, name: str) -> Any:
        """The field's value, or None where it is absent or null."""
        return self._left.pop(name, None)

    def take_first(self, *names: str) -> Any:
        """The first of several names for the same; the others go with it."""
        given = [self._left.pop(name, None) for name in names]
        return next((value for value in given if value is not None), None)

    def word(self, *names: str) -> str | None:
        """As `take_first`. Raises RequestError where it is no string."""
        return word_of(self.take_first(*names), names[0])

    def mapping(self, name: str) -> Mapping[str, Any] | None:
        """As `take`. Raises RequestError where it is no object."""
        return mapping_of(self.take(name), name)

    def drop(self, *names: str) -> None:
        for name in names:
            self._left.pop(name, None)

    def finish(self) -> None:
        """Raises Unsupported for the first field that was not taken and says more than what happens anyway."""
        for name, value in self._left.items():
            if not is_harmless(name, value):
                raise unsupported(self.target, name)


def word_of(value: Any, param: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise RequestError(f"{param} must be a string", param=param)
    return value


def mapping_of(value: Any, param: str) -> Mapping[str, Any] | None:
    if value is not None and not isinstance(value, Mapping):
        raise RequestError(f"{param} must be an object", param=param)
    return value


def own_blocks(message: Mapping[str, Any], kinds: frozenset[str]) -> Iterator[dict[str, Any]]:
    """Those of the message's `thinking_blocks` that are of these kinds; others are another provider's."""
    blocks = message.get("thinking_blocks")
    for block in blocks if isinstance(blocks, list) else ():
        if isinstance(block, Mapping) and isinstance(block.get("type"), str) and block["type"] in kinds:
            # Clients that put a stream together keep the index of its deltas.
            yield {name: value for name, value in block.items() if name != "index"}


def role_of(target: Target, message: Mapping[str, Any], path: str) -> Any:
    """Who speaks. Raises Unsupported for what stands on a message and no dialect but OpenAI's chat has."""
    role = message.get("role")
    if message.get("name") and role != "tool":
        raise unsupported(target, f"{path}.name", "messages have no names there")
    for name in ("function_call", "audio"):
        if message.get(name):
            raise unsupported(target, f"{path}.{name}")
    return role


def called_function(target: Target, call: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The function of a tool call. Raises Unsupported where something else was called, RequestError without a name."""
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise unsupported(target, where, "only functions can be called")
    if not isinstance(function.get("name"), str):
        raise RequestError(f"{where}.function.name must be a string", param=where)
    return function


def is_harmless(name: str, value: Any) -> bool:
    """Whether this field says no more than what happens without it."""
    return any(value == one and isinstance(value, bool) is isinstance(one, bool) for one in HARMLESS.get(name, ()))


class MediaPart(NamedTuple):
    """What a `data:` URL holds."""

    kind: str
    data: str
    """base64"""


def read_data_url(url: str, param: str) -> MediaPart:
    """Raises RequestError where it is not base64 of a stated type."""
    match = _DATA_URL.match(url)
    if match is None or match.group(1) is None:
        raise RequestError(f"{param} must be a data URL of the form data:image/png;base64,...", param=param)
    data = url[match.end() :]
    if ";base64" not in match.group(2):
        raise RequestError(f"{param} must be base64: data:{match.group(1)};base64,...", param=param)
    try:
        base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{param} is not valid base64: {error}", param=param) from error
    return MediaPart(match.group(1).lower(), data)


def image_url_of(part: Mapping[str, Any], param: str) -> str:
    """The URL of an `image_url` part, in either of its two shapes."""
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, Mapping) else image
    if not isinstance(url, str) or not url:
        raise RequestError(f"{param}.image_url.url must be a URL", param=f"{param}.image_url")
    return url


def parts_of(content: Any) -> Sequence[Mapping[str, Any]]:
    """A message's content as parts."""
    if content is None:
        return ()
    return ({"type": "text", "text": content},) if isinstance(content, str) else content


def text_of(part: Mapping[str, Any]) -> str | None:
    """The text of a part that is nothing but text."""
    kind = part.get("type")
    value = part.get("refusal" if kind == "refusal" else "text")
    return value if kind in ("text", "input_text", "output_text", "refusal") and isinstance(value, str) else None


def arguments_of(function: Mapping[str, Any], param: str) -> dict[str, Any]:
    """A tool call's arguments as an object. Raises RequestError."""
    text = function.get("arguments") or "{}"
    try:
        value = orjson.loads(text) if isinstance(text, str) else text
    except orjson.JSONDecodeError as error:
        raise RequestError(f"{param}.function.arguments is not JSON: {error}", param=param) from error
    if not isinstance(value, dict):
        raise RequestError(f"{param}.function.arguments must be a JSON object", param=param)
    return value


class ToolChoice(NamedTuple):
    mode: str
    """auto, none, required, or named."""
    names: tuple[str, ...] = ()
    """The tools that may be called; empty: all."""


def read_tool_choice(target: Target, value: Any) -> ToolChoice | None:
    """What `tool_choice` asks for. Raises Unsupported where it is about something other than functions."""
    if value is None:
        return None
    if value in ("auto", "none", "required"):
        return ToolChoice(value)
    if isinstance(value, Mapping):
        function, allowed = value.get("function"), value.get("allowed_tools")
        if value.get("type") == "function" and isinstance(function, Mapping) and isinstance(function.get("name"), str):
            return ToolChoice("named", (function["name"],))
        if value.get("type") == "allowed_tools" and isinstance(allowed, Mapping):
            tools = allowed.get("tools")
            names = tuple(_allowed_name(target, tool) for tool in (tools if isinstance(tools, list) else ()))
            return ToolChoice("required" if allowed.get("mode") == "required" else "auto", names)
    raise unsupported(target, "tool_choice")


def _allowed_name(target: Target, tool: Any) -> str:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise unsupported(target, "tool_choice")
    return name


def functions_of(target: Target, tools: Sequence[Any]) -> list[Mapping[str, Any]]:
    """The tools, each a function. Raises Unsupported for the first that is something else."""
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            raise unsupported(target, f"tools[{index}]", "only functions can be offered")
        known = {"name", "description", "parameters", "strict"}
        extra = next(
            (name for name, value in tool["function"].items() if name not in known and value is not None), None
        )
        if extra is not None:
            raise unsupported(target, f"tools[{index}].function.{extra}")
    return list(tools)


def schema_of(fields: ChatFields) -> tuple[str, Mapping[str, Any] | None]:
    """(kind, schema) of `response_format`: text, json_object or json_schema."""
    given = fields.take("response_format")
    if not isinstance(given, Mapping):
        return "text", None
    kind = str(given.get("type"))
    if kind == "json_schema":
        wrapper = given.get("json_schema")
        schema = wrapper.get("schema") if isinstance(wrapper, Mapping) else None
        return kind, schema if isinstance(schema, Mapping) else {}
    return kind, None
