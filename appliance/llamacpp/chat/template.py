"""Chat messages to the model's prompt text, by the template in its GGUF."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2.exceptions import SecurityError

from appliance.core.json_types import JsonObject
from appliance.errors import RequestError, Unsupported
from appliance.llamacpp.chat.template_sandbox import TemplateLimit, TemplateSandbox

Message = JsonObject

MAX_TEMPLATE_CHARS = 1_000_000
_PROBE = "probe-3f1c"
_NO_PARAMETERS = {"type": "object", "properties": {}, "required": []}
_NINE = re.compile(r"[A-Za-z0-9]{9}")


class TemplateRefused(Exception):
    """The template called `raise_exception`: its own words about what is wrong with the messages."""


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefused(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern[:200])


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As Hugging Face defines it: `<`, `>` and `&` stay as they are, unlike in Jinja's own filter."""
    indent = None if indent is None else min(indent, 16)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_SANDBOX = TemplateSandbox(
    functions={"raise_exception": _raise_exception, "strftime_now": _strftime_now}, filters={"tojson": _tojson}
)


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    return _SANDBOX.from_string(source)


@dataclass(frozen=True, slots=True)
class TemplateAbilities:
    """What a template makes of a message, found by rendering probes."""

    system: bool
    developer: bool
    tools: bool
    """Tools that are given appear in the prompt."""
    effort: bool
    """It reads `reasoning_effort`."""
    switch: bool
    """It reads `enable_thinking`."""


class ChatTemplate:
    """One model's template. Rendering is pure but for `strftime_now`, and may run in any thread."""

    def __init__(self, source: str, *, bos_text: str = "", eos_text: str = "") -> None:
        """Raises RequestError when the source is no template at all."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise RequestError(f"the model's chat template has {len(source)} characters; at most {MAX_TEMPLATE_CHARS}")
        self.source = source
        self._special = {"bos_token": bos_text, "eos_token": eos_text}
        try:
            self._template = _compile(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
            raise RequestError(f"the model's chat template cannot be read: {error}") from error
        self.abilities = TemplateAbilities(
            system=self._shows({"role": "system", "content": _PROBE}, {"role": "user", "content": "hi"}),
            developer="developer" in source,
            tools="tools" in source and self._shows_tools(),
            effort="reasoning_effort" in source,
            switch="enable_thinking" in source,
        )

    def knows(self, name: str) -> bool:
        """Whether the template looks at a variable of this name at all."""
        return re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", self.source) is not None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[JsonObject] | None = None,
        reply: bool = True,
        variables: JsonObject | None = None,
    ) -> str:
        """The prompt text; with `reply` it ends where the assistant's answer begins. `variables`: further ones that
        the template knows, such as `enable_thinking`.

        Raises RequestError carrying the template's own message when it refuses these messages, and Unsupported when
        it has no place for tools.
        """
        if tools and not self.abilities.tools:
            raise Unsupported("tools: this model's chat template has no place for tools; leave them out", param="tools")
        fitted = self._with_tool_names([self._fitted(message) for message in messages])
        return self._render(fitted if self.abilities.system else _folded(fitted), tools or None, reply, variables)

    def end_of_turn(self) -> str:
        """What the template writes after an assistant's answer; empty when it cannot be found out."""
        try:
            text = self.render(
                [{"role": "user", "content": "hi"}, {"role": "assistant", "content": _PROBE}], reply=False
            )
        except RequestError:
            return ""
        return text.rpartition(_PROBE)[2] if _PROBE in text else ""

    def _fitted(self, message: Message) -> Message:
        """A message as templates know them: roles they have, tool arguments as objects, content never None."""
        fitted = dict(message)
        if fitted.get("role") == "developer" and not self.abilities.developer:
            fitted["role"] = "system"
        if fitted.get("content") is None:
            fitted["content"] = ""
        if fitted.get("tool_calls"):
            fitted["tool_calls"] = [self._fitted_call(call) for call in fitted["tool_calls"]]
        elif "tool_calls" in fitted:
            del fitted["tool_calls"]  # templates ask whether it is there, not whether it is empty
        if "tool_call_id" in fitted:
            fitted["tool_call_id"] = self._fitted_id(fitted["tool_call_id"])
        if fitted.get("reasoning_content") and "message.thinking" in self.source:
            fitted.setdefault("thinking", fitted["reasoning_content"])
        return fitted

    def _fitted_call(self, call: Any) -> Any:
        parsed = _with_parsed_arguments(call)
        return {**parsed, "id": self._fitted_id(parsed.get("id"))} if isinstance(parsed, Mapping) else parsed

    def _fitted_id(self, given: Any) -> Any:
        """Some templates refuse ids that are not 9 letters and digits, as their model's own are."""
        if not isinstance(given, str) or "length 9" not in self.source or _NINE.fullmatch(given):
            return given
        return hashlib.sha256(given.encode("utf-8", "replace")).hexdigest()[:9]

    def _with_tool_names(self, messages: Sequence[Message]) -> list[Message]:
        """OpenAI's tool results carry the call's id alone; some templates print the tool's name."""
        names: dict[Any, Any] = {}
        named: list[Message] = []
        for message in messages:
            for call in message.get("tool_calls") or ():
                if isinstance(call, Mapping) and isinstance(function := call.get("function"), Mapping):
                    names[str(call.get("id"))] = function.get("name")
            name = names.get(str(message.get("tool_call_id"))) if message.get("role") == "tool" else None
            named.append({**message, "name": name} if name is not None and "name" not in message else message)
        return named

    def _shows_tools(self) -> bool:
        tool = {"type": "function", "function": {"name": _PROBE, "description": "-", "parameters": _NO_PARAMETERS}}
        try:
            return _PROBE in self._render([{"role": "user", "content": "hi"}], [tool], True)
        except RequestError:
            return False

    def _shows(self, *messages: Message) -> bool:
        try:
            return _PROBE in self._render(messages, None, True)
        except RequestError:
            return False

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[JsonObject] | None,
        reply: bool,
        more: JsonObject | None = None,
    ) -> str:
        own = {"messages": messages, "tools": tools, "add_generation_prompt": reply, **self._special}
        try:
            return _SANDBOX.render_bounded(self._template, {**(more or {}), **own})
        except Exception as error:
            # A template is a program: with messages it does not expect it may fail in any way Python can.
            raise RequestError(f"messages: the model's chat template {_reason(error)}", param="messages") from error


def _reason(error: Exception) -> str:
    match error:
        case TemplateRefused():
            return f"refuses them: {error}"
        case TemplateLimit():
            return f"{error}; send fewer or shorter messages"
        case SecurityError():
            return f"does what it may not: {error}"
        case RecursionError():
            return "calls itself too deeply"
        case _:
            return f"fails on them ({type(error).__name__}: {error})"


def _folded(messages: Sequence[Message]) -> list[Message]:
    """System messages put at the head of the first user message, for models that were trained without such a role."""
    system = [str(message["content"]) for message in messages if message.get("role") == "system"]
    rest = [dict(message) for message in messages if message.get("role") != "system"]
    first = next((message for message in rest if message.get("role") == "user"), None)
    if not system or first is None:
        return list(messages)
    first["content"] = "\n\n".join([*system, first["content"]])
    return list(rest)


def _with_parsed_arguments(call: Any) -> Any:
    """OpenAI carries a tool call's arguments as a JSON string; the templates were written for the object in it."""
    if not isinstance(call, Mapping) or not isinstance(function := call.get("function"), Mapping):
        return call
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments)
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": parsed}}
