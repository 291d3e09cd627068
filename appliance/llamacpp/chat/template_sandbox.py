"""Runs a model's own Jinja template as what it is: a stranger's program that came with a download.

Jinja's immutable sandbox closes the way to Python's internals. What it leaves open is work without end (nested loops,
macros that call themselves twice) and memory without end (strings that double), so both are counted here.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import Template, nodes, pass_context, pass_eval_context
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent, do_join, do_replace
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from appliance.core.json_types import JsonObject

MAX_STEPS = 2_000_000
"""Loop rounds and calls in one rendering. A 1,000-message conversation takes about 20,000 in the longest templates."""
MAX_SECONDS = 2.0
MAX_STRING_CHARS = 16_000_000
"""Longest string a template may make: more than a request body can hold (10 MB) after escaping some of it."""
MAX_WIDTH = 10_000
"""Largest number that may ask for padding or indentation."""

_MAX_NUMBER = 10**30

# No identifier, so a template can neither name nor overwrite them.
_BUDGET = "·budget"
_LOOP = "·loop"
_JOIN = "·join"

# A width or precision of five digits or more, or one that is itself a field.
_WIDE_FORMAT = re.compile(r"[0-9]{5,}|:[^}]*\{")

_GROWING = frozenset({"ljust", "rjust", "center", "zfill", "expandtabs", "replace", "join"})
# They pad or lay out to any width, and none of 70 published chat templates uses them.
_REMOVED_FILTERS = ("center", "format", "wordwrap", "pprint", "filesizeformat", "xmlattr", "urlize", "random")


class TemplateLimit(Exception):
    """The template worked too long or made too long a text."""


class _Budget:
    __slots__ = ("_chars", "_deadline", "_steps")

    def __init__(self) -> None:
        self._steps = 0
        self._chars = 0
        self._deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise TemplateLimit(f"took more than {MAX_STEPS} steps")
        if self._steps % 256 == 0 and time.monotonic() > self._deadline:
            raise TemplateLimit(f"took more than {MAX_SECONDS:g} seconds")

    def write(self, chars: int) -> None:
        self._chars += chars
        _check_chars(self._chars)


def _check_chars(chars: int) -> None:
    if chars > MAX_STRING_CHARS:
        raise TemplateLimit(f"made a text of more than {MAX_STRING_CHARS} characters")


@pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    budget: _Budget = context[_BUDGET]
    for item in items:
        budget.step()
        yield item


@pass_context
def _written(context: Context, value: Any) -> str:
    """Jinja calls this for everything the template prints, into the reply or into a macro's or block's own buffer."""
    text = value if isinstance(value, str) else str(value)
    budget: _Budget = context[_BUDGET]
    budget.write(len(text))
    return text


def _joined(parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    _check_chars(sum(map(len, texts)))
    return "".join(texts)


def _size(value: object) -> int:
    """Characters a value could add to a text."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list | tuple):
        return sum(map(_size, value))
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return 32


def _check_growth(method: str, text: str, arguments: tuple[Any, ...]) -> None:
    """Refuse a str method whose result would be too long, before it is made."""
    if method == "replace" and len(arguments) >= 2:
        _check_chars((len(text) // max(1, _size(arguments[0])) + 1) * _size(arguments[1]))
    elif method == "join" and arguments:
        parts = arguments[0] if isinstance(arguments[0], list | tuple | str) else ()
        _check_chars(_size(parts) + len(text) * len(parts))
    elif any(isinstance(value, int) and value > MAX_WIDTH for value in arguments):
        raise TemplateLimit(f"pads a text to more than {MAX_WIDTH} characters")


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here they are words like others."""

    tags: set[str] = {"generation"}  # noqa: RUF012  Jinja's own type

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Bounder(NodeTransformer):
    """Rewrites a template so that every loop round is counted, and every `~` and every printed text measured."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        # `else` and `loop.length` still work: Jinja's loop context reads ahead where it must.
        node.iter = nodes.Filter(node.iter, _LOOP, [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, _JOIN, [], [], None, None, lineno=node.lineno)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        # Jinja writes template data as it is, without asking `finalize`; a constant it does ask for.
        return nodes.Const(node.data, lineno=node.lineno)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Jinja as Hugging Face sets it up for chat templates, with limits on work and size."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, functions: Mapping[str, Callable[..., Any]], filters: Mapping[str, Callable[..., Any]]) -> None:
        # Without the optimizer nothing of the template runs while it is compiled, before there is a budget.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            optimized=False,
            finalize=_written,
        )
        self.globals.update(functions)
        for name in _REMOVED_FILTERS:
            self.filters.pop(name, None)
        self.filters.update(filters)
        self.filters.update({_LOOP: _counted, _JOIN: _joined, "replace": _replace, "join": _join, "indent": _indent})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        parsed = super()._parse(source, name, filename)
        bounded = _Bounder().visit(parsed)
        assert isinstance(bounded, nodes.Template)
        return bounded

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        pattern: str = value.__self__

        def bounded(*args: Any, **kwargs: Any) -> str:
            if _WIDE_FORMAT.search(pattern):
                raise TemplateLimit("formats a text to a width of its own choice")
            _check_chars(len(pattern) + pattern.count("{") * _size([*args, *kwargs.values()]))
            return wrapped(*args, **kwargs)

        return bounded

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget: _Budget = context[_BUDGET]
        budget.step()
        method = getattr(obj, "__name__", "")
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str) and method in _GROWING:
            _check_growth(method, owner, (*args, *kwargs.values()))
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _BINARY[operator](left, right)
        return super().call_binop(context, operator, left, right)

    def render_bounded(self, template: Template, variables: JsonObject) -> str:
        """The rendered text. Raises TemplateLimit, or whatever the template itself raises."""
        return template.render({**variables, _BUDGET: _Budget()})


def _check_plus(left: Any, right: Any) -> None:
    if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        _check_chars(len(left) + len(right))


def _check_times(left: Any, right: Any) -> None:
    for count, whole in ((left, right), (right, left)):
        if isinstance(count, int) and isinstance(whole, str | list | tuple):
            _check_chars(count * len(whole))
        elif isinstance(count, int) and abs(count) > _MAX_NUMBER:
            raise TemplateLimit("multiplies huge numbers")


def _check_power(left: Any, right: Any) -> None:
    if abs(left) > 1_000_000 or abs(right) > 64:
        raise TemplateLimit("raises a number to a huge power")


def _check_modulo(left: Any, right: Any) -> None:
    if isinstance(left, str):
        raise TemplateLimit("formats a text with %, which is not allowed")


_BINARY: Mapping[str, Callable[[Any, Any], None]] = {
    "+": _check_plus,
    "*": _check_times,
    "**": _check_power,
    "%": _check_modulo,
}


@pass_eval_context
def _replace(context: nodes.EvalContext, text: Any, old: str, new: str, count: int | None = None) -> str:
    _check_growth("replace", str(text), (old, new))
    return do_replace(context, text, old, new, count)


@pass_eval_context
def _join(context: nodes.EvalContext, parts: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    held = list(parts)
    _check_chars(_size(held) + len(d) * len(held))
    return str(do_join(context, held, d, attribute))


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    chars = len(width) if isinstance(width, str) else width
    _check_chars(len(s) + chars * (s.count("\n") + 1))
    return do_indent(s, width, first, blank)
