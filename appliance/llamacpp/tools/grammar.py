"""What a reply may look like, as a grammar: free text up to a call, and calls with arguments that fit their schemas.

The grammar is llguidance's dialect of Lark. Free text costs about 2 us a token (measured with 151,936 tokens).
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from appliance.core import ReasoningFormat, ToolFormat
from appliance.core.json_types import JsonSchema
from appliance.llamacpp.tools.formats import SYNTAXES, THINKING, ToolSyntax
from appliance.llamacpp.tools.offered import OfferedTools

_GUIDANCE: Final[JsonSchema] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
"""As templates write the arguments of earlier calls, so the model sees one form only."""
_MAX_LOOSE: Final = 8
"""Tools with a search of their own for calls without a marker; among more, arguments are held to be an object."""
_COMMONS: Final = ("$defs", "definitions")

Enforceable = Callable[[str, JsonSchema], JsonSchema]
"""The schema of a tool, or what is enforced in its place where it uses what cannot be."""


@dataclass(frozen=True, slots=True)
class ReplyGrammarSpec:
    """What one call's replies are held to. At least one of tools and schema is given."""

    offered: OfferedTools | None
    tools: ToolFormat | None
    schema: JsonSchema | None = None
    """Of the content, where JSON was asked for."""
    reasoning: ReasoningFormat | None = None
    thinking_open: bool = False
    specials: Mapping[str, int] = field(default_factory=dict)
    """Texts of control tokens and their ids; whatever else stands in a marker is letters."""


def write_grammar(spec: ReplyGrammarSpec, enforceable: Enforceable) -> str:
    """The grammar of a reply, beginning where the prompt ends."""
    return _Writer(spec, enforceable).grammar()


class _Writer:
    def __init__(self, spec: ReplyGrammarSpec, enforceable: Enforceable) -> None:
        self._spec = spec
        self._specials = spec.specials
        texts = sorted(map(re.escape, self._specials), key=len, reverse=True)
        self._special = re.compile("|".join(texts)) if texts else None
        self._lines: list[str] = []
        schemas = spec.offered.schemas if spec.offered is not None else {}
        self._schemas = {name: enforceable(name, schema) for name, schema in schemas.items()}

    def grammar(self) -> str:
        harmony = "harmony" in (self._spec.tools, self._spec.reasoning)
        start = self._channels() if harmony else f"{self._thinking()} {self._answer()}"
        return "\n".join(["%llguidance {}", f"start: {start}", *self._lines, r"TXT: /(.|\n)*/", r"WS: /[ \n]*/", ""])

    # The parts of a reply

    def _thinking(self) -> str:
        if self._spec.reasoning is None:
            return ""
        opens, shuts = THINKING[self._spec.reasoning]
        thought = f"{self._text_until(shuts)} WS"
        return thought if self._spec.thinking_open else f"({self._literal(opens)} {thought})?"

    def _answer(self) -> str:
        spec = self._spec
        if spec.offered is None or spec.tools is None:
            return self._content()
        syntax = SYNTAXES[spec.tools]
        calls = self._calls(syntax)
        opening = self._literal(syntax.opening)
        if spec.offered.required:
            return f"{opening} {calls}"
        if spec.schema is not None:
            return f"({self._content()} | {opening} {calls})"
        if syntax.bare:
            return f"({self._plain_words(syntax)} | {self._bare_openings(syntax)} {calls})"
        loose = f" | {self._loose_calls()}" if syntax.loose else ""
        if syntax.opening in self._specials:
            return f"(TXT ({opening} {calls})?{loose})"
        return f"(TXT | {self._text_until(syntax.opening)} {calls}{loose})"

    def _content(self) -> str:
        return "TXT" if self._spec.schema is None else _json_rule(self._spec.schema)

    def _plain_words(self, syntax: ToolSyntax) -> str:
        """Text that cannot be taken for a call."""
        return self._rule("PLAIN", rf"/(\s*[^\s{re.escape(syntax.bare)}](.|\n)*)?/")

    def _bare_openings(self, syntax: ToolSyntax) -> str:
        tokens = [f"<[{self._specials[one]}]>" for one in syntax.also_opens if one in self._specials]
        return f"({' | '.join(tokens)})?" if tokens else ""

    def _channels(self) -> str:
        """Harmony: messages of thinking and of comment, then the answer or a call."""
        channel, message = self._literal("<|channel|>"), self._literal("<|message|>")
        self._rule(
            "turn",
            f'{channel} ("analysis" | "commentary") {message} {self._text_until("<|end|>")} '
            f'{self._literal("<|start|>")} "assistant"',
        )
        ends = [f'{channel} "final" {message} {self._content()}']
        if self._spec.offered is not None:
            calls = [self._call(SYNTAXES["harmony"], name, "") for name in self._schemas]
            ends = calls if self._spec.offered.required else [*ends, *calls]
        return f"turn* ({' | '.join(ends)})"

    # Calls

    def _calls(self, syntax: ToolSyntax) -> str:
        """What follows the opening marker: one call or, where that is allowed, several."""
        assert self._spec.offered is not None
        inside = "" if syntax.section_open or syntax.bare else syntax.opening
        first = " | ".join(self._call(syntax, name, inside) for name in self._schemas)
        more = ""
        if self._spec.offered.parallel:
            following = " | ".join(self._call(syntax, name, "") for name in self._schemas)
            more = f"({self._literal(syntax.between)} ({following}))*"
        head, tail = syntax.list_open, syntax.list_close + syntax.section_close
        return f"{self._literal(head)} ({first}) {more} {self._literal(tail)}"

    def _loose_calls(self) -> str:
        """A call's JSON without its marker, wherever it stands: its arguments are held to their schema all the same."""
        assert self._spec.offered is not None
        heads = []
        if len(self._schemas) > _MAX_LOOSE:
            heads.append(("|".join(map(re.escape, self._schemas)), _json_rule({"type": "object"})))
        else:
            heads += [(re.escape(name), _json_rule(schema)) for name, schema in self._schemas.items()]
        choices = []
        for number, (names, arguments) in enumerate(heads):
            head = rf'/(.|\n)*\{{\s*"name"\s*:\s*"({names})"\s*,\s*"(arguments|parameters)"\s*:\s*/'
            self._rule(f"loose_{number}[lazy]", head)
            choices.append(self._rule(f"loose_{number}_call", f"loose_{number} {arguments}"))
        one = f"({' | '.join(choices)})"
        return f"{one}+ TXT" if self._spec.offered.parallel else one

    def _call(self, syntax: ToolSyntax, name: str, written: str) -> str:
        """One call as a rule, without the part of it that is `written` already."""
        number = list(self._schemas).index(name)
        head = syntax.call_open.replace("{name}", name)[len(written) :]
        rule = f"call_{number}_{'first' if written else 'next'}"
        arguments = self._arguments(syntax, number, self._schemas[name])
        return self._rule(rule, f"{self._literal(head)} {arguments} {self._literal(syntax.call_close)}")

    def _arguments(self, syntax: ToolSyntax, number: int, schema: JsonSchema) -> str:
        rule = f"args_{number}"
        if syntax.kind not in ("tagged", "pythonic"):
            return self._rule(rule, _json_rule(schema))
        properties = schema.get("properties")
        if not isinstance(properties, Mapping):
            properties = {}
        required = schema.get("required")
        commons = {key: schema[key] for key in _COMMONS if key in schema}
        parts: list[tuple[str, bool]] = []
        for position, (key, inner) in enumerate(properties.items()):
            value = {**commons, **inner} if isinstance(inner, Mapping) else dict(commons)
            write = self._tagged if syntax.kind == "tagged" else self._keyword
            part = self._rule(f"{rule}_{position}", write(syntax, f"{rule}_{position}_value", key, value))
            parts.append((part, isinstance(required, list) and key in required))
        return self._rule(rule, _joined(parts, '", "' if syntax.kind == "pythonic" else ""))

    def _tagged(self, syntax: ToolSyntax, rule: str, key: str, schema: JsonSchema) -> str:
        before, middle, after = syntax.parameter
        head = f"{self._literal(before + key + middle)}"
        if schema.get("type") == "string" and not isinstance(schema.get("enum"), list):
            end = after.rstrip("\n") if after.startswith("</") else after
            rest = after[len(end) :]
            return f"{head} {self._text_until(end, rule)} {self._literal(rest)}"
        if isinstance(choices := schema.get("enum"), list) and all(isinstance(one, str) for one in choices):
            values = " | ".join(self._literal(one) for one in choices)
            return f"{head} ({values}) {self._literal(after)}"
        return f"{head} {_json_rule(schema)} {self._literal(after)}"

    def _keyword(self, syntax: ToolSyntax, rule: str, key: str, schema: JsonSchema) -> str:
        value = '("True" | "False")' if schema.get("type") == "boolean" else _json_rule(schema)
        return f"{_quoted(key + '=')} {value}"

    # Words of the grammar

    def _text_until(self, marker: str, rule: str = "") -> str:
        """Free text that ends with the marker."""
        if marker in self._specials:
            return f"TXT <[{self._specials[marker]}]>"
        name = rule or f"until_{sum(line.startswith('until_') for line in self._lines)}"
        line = f"{name}[lazy]: /(.|\\n)*/ {_quoted(marker)}"
        if line not in self._lines:
            self._lines.append(line)
        return name

    def _literal(self, text: str) -> str:
        """The text, its control tokens as tokens."""
        words: list[str] = []
        edge = 0
        for match in self._special.finditer(text) if self._special else ():
            words += [_quoted(text[edge : match.start()]), f"<[{self._specials[match.group()]}]>"]
            edge = match.end()
        words.append(_quoted(text[edge:]))
        return " ".join(filter(None, words))

    def _rule(self, name: str, body: str) -> str:
        line = f"{name}: {body}"
        if line not in self._lines:
            self._lines.append(line)
        return name


def _joined(parts: Sequence[tuple[str, bool]], separator: str) -> str:
    """Parts in order, each with whether it must stand there; one may be left out where it need not."""
    if not separator:
        return " ".join(part if needed else f"{part}?" for part, needed in parts) or '""'
    choices = []
    for first, (part, needed) in enumerate(parts):
        rest = (f"{separator} {one}" if must else f"({separator} {one})?" for one, must in parts[first + 1 :])
        choices.append(" ".join((part, *rest)))
        if needed:
            break
    else:
        choices.append('""')
    return f"({' | '.join(choices)})"


def _json_rule(schema: JsonSchema) -> str:
    return f"%json {json.dumps({'x-guidance': dict(_GUIDANCE), **schema})}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
