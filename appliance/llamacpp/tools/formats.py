"""How model families write tool calls and reasoning, as data, and which of them a chat template teaches.

Sources: the families' published chat templates and model cards.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from appliance.core import ReasoningFormat, ToolFormat
from appliance.core.json_types import JsonSchema

ToolSchemas = Mapping[str, JsonSchema]
"""The parameters' JSON schema of every tool that was offered, by name."""
MAX_NAME_CHARS: Final = 256
"""Of a tool's name in a reply: what is longer is no name."""

Kind = Literal["json", "named", "tagged", "pythonic", "harmony"]


@dataclass(frozen=True, slots=True)
class ToolSyntax:
    """One way to write calls: `section_open list_open (call_open ARGUMENTS call_close) between ... list_close
    section_close`.

    `call_open` holds `{name}`. What is written in free text before `section_open` is content.
    """

    kind: Kind
    section_open: str = ""
    call_open: str = ""
    call_close: str = ""
    between: str = ""
    section_close: str = ""
    list_open: str = ""
    list_close: str = ""
    also_opens: tuple[str, ...] = ()
    """Other markers that a model may open with instead."""
    bare: str = ""
    """The sign that opens a call at the very start of a reply, without a marker."""
    markers: tuple[str, ...] = ()
    """Further texts that may be control tokens of the vocabulary and are looked at when a reply is read."""
    loose: bool = False
    """Small models of the family often forget the marker, or write another one, around the JSON of a call."""
    parameter: tuple[str, str, str] = ("", "", "")
    """Of tagged arguments: what stands before the key, between key and value, and behind the value."""

    @property
    def opening(self) -> str:
        """The marker after which calls follow; empty where there is none."""
        if self.bare:
            return ""
        return self.section_open or self.call_open.partition("{name}")[0].partition("\n")[0]

    @property
    def triggers(self) -> tuple[str, ...]:
        """Markers that end the free text."""
        return tuple(filter(None, (self.opening, *self.also_opens)))


# DeepSeek's markers are made of a wide bar and of a low block instead of spaces.
_CALLS_BEGIN: Final = "<\uff5ctool\u2581calls\u2581begin\uff5c>"
_CALLS_END: Final = "<\uff5ctool\u2581calls\u2581end\uff5c>"
_CALL_BEGIN: Final = "<\uff5ctool\u2581call\u2581begin\uff5c>"
DEEPSEEK_CALL_END: Final = "<\uff5ctool\u2581call\u2581end\uff5c>"
_SEPARATOR: Final = "<\uff5ctool\u2581sep\uff5c>"

_HERMES_CALL: Final = '{"name": "{name}", "arguments": '

SYNTAXES: Final[Mapping[ToolFormat, ToolSyntax]] = {
    "hermes": ToolSyntax(
        "json",
        call_open="<tool_call>\n" + _HERMES_CALL,
        call_close="}\n</tool_call>",
        between="\n",
        markers=("</tool_call>",),
        loose=True,
    ),
    "hermes_list": ToolSyntax(
        "json",
        section_open="<tool_call>",
        call_open=_HERMES_CALL,
        call_close="}",
        between=", ",
        section_close="</tool_call>",
        list_open="[",
        list_close="]",
        loose=True,
    ),
    "granite": ToolSyntax(
        "json",
        section_open="<|tool_call|>",
        call_open=_HERMES_CALL,
        call_close="}",
        between=", ",
        list_open="[",
        list_close="]",
    ),
    "phi4": ToolSyntax(
        "json",
        section_open="<|tool_call|>",
        call_open=_HERMES_CALL,
        call_close="}",
        between=", ",
        section_close="<|/tool_call|>",
        list_open="[",
        list_close="]",
        also_opens=("functools[",),
    ),
    "mistral": ToolSyntax(
        "json",
        section_open="[TOOL_CALLS]",
        call_open=_HERMES_CALL,
        call_close="}",
        between=", ",
        list_open="[",
        list_close="]",
    ),
    "llama3": ToolSyntax(
        "json",
        call_open='{"name": "{name}", "parameters": ',
        call_close="}",
        between="; ",
        also_opens=("<|python_tag|>",),
        bare="{",
    ),
    "mistral_named": ToolSyntax("named", call_open="[TOOL_CALLS]{name}[ARGS]", markers=("[CALL_ID]",)),
    "deepseek_v3": ToolSyntax(
        "named",
        section_open=_CALLS_BEGIN,
        call_open=_CALL_BEGIN + "function" + _SEPARATOR + "{name}\n```json\n",
        call_close="\n```" + DEEPSEEK_CALL_END,
        between="\n",
        section_close=_CALLS_END,
    ),
    "deepseek_v31": ToolSyntax(
        "named",
        section_open=_CALLS_BEGIN,
        call_open=_CALL_BEGIN + "{name}" + _SEPARATOR,
        call_close=DEEPSEEK_CALL_END,
        section_close=_CALLS_END,
    ),
    "qwen3_coder": ToolSyntax(
        "tagged",
        call_open="<tool_call>\n<function={name}>\n",
        call_close="</function>\n</tool_call>",
        between="\n",
        also_opens=("<function=",),
        markers=("</tool_call>",),
        parameter=("<parameter=", ">\n", "\n</parameter>\n"),
    ),
    "glm": ToolSyntax(
        "tagged",
        call_open="<tool_call>{name}\n",
        call_close="</tool_call>",
        between="\n",
        markers=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        parameter=("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
    ),
    "pythonic": ToolSyntax(
        "pythonic", call_open="{name}(", call_close=")", between=", ", list_open="[", list_close="]", bare="["
    ),
    "lfm2": ToolSyntax(
        "pythonic",
        section_open="<|tool_call_start|>",
        call_open="{name}(",
        call_close=")",
        between=", ",
        section_close="<|tool_call_end|>",
        list_open="[",
        list_close="]",
    ),
    "harmony": ToolSyntax(
        "harmony",
        call_open="<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>",
        markers=("<|start|>", "<|end|>", "<|call|>", "<|return|>"),
    ),
}

WRAPPERS: Final = ("```json", "```xml", "```", "<tools>", "<tool>", "<function_call>", "<response>", "<json>", "<xml>")
"""What models write around a call where they forget their own marker."""

THINKING: Final[Mapping[ReasoningFormat, tuple[str, str]]] = {
    "think": ("<think>", "</think>"),
    "mistral_think": ("[THINK]", "[/THINK]"),
}
"""Opening and closing marker; Harmony has channels instead."""

_TELLS: Final[tuple[tuple[ToolFormat, tuple[str, ...]], ...]] = (
    ("harmony", ("<|channel|>", "<|message|>")),
    ("mistral_named", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("deepseek_v3", (_CALLS_BEGIN, "```json")),
    ("deepseek_v31", (_CALLS_BEGIN,)),
    ("glm", ("<arg_key>",)),
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("lfm2", ("<|tool_call_start|>",)),
    ("phi4", ("<|tool|>",)),
    ("granite", ("<|tool_call|>",)),
    ("hermes_list", ("<tool_call>[",)),
    ("hermes", ("<tool_call>",)),
    ("llama3", ("<|python_tag|>", "parameters")),
    ("llama3", ("ipython", '"parameters"')),
    ("pythonic", ("func_name1(params_name1=",)),
)
"""Texts that together stand in no other family's template, the most particular first."""


def find_tool_format(template: str) -> ToolFormat | None:
    """The format a template teaches its model; None where it is none we can read."""
    return next((name for name, tells in _TELLS if all(tell in template for tell in tells)), None)


def find_reasoning_format(template: str) -> ReasoningFormat | None:
    """How a model with this template writes what it thinks before it answers; None where it does not."""
    if "<|channel|>" in template and "<|message|>" in template:
        return "harmony"
    return next((name for name, (_, close) in THINKING.items() if close in template), None)


def list_markers(tools: ToolFormat | None, reasoning: ReasoningFormat | None) -> frozenset[str]:
    """All texts that structure a reply, so that those which are control tokens are shown to its reader."""
    texts: set[str] = set(THINKING.get(reasoning, ())) if reasoning is not None else set()
    if reasoning == "harmony":
        tools = "harmony"
    if tools is not None:
        syntax = SYNTAXES[tools]
        written = (syntax.section_open, syntax.call_open, syntax.call_close, syntax.section_close)
        texts |= {*written, *syntax.triggers, *syntax.markers, *syntax.parameter}
    return frozenset(filter(None, texts))
