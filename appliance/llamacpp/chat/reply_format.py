"""How one model writes tool calls and reasoning: what its template teaches, and which of the markers are tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from appliance.core import Ability, ReasoningFormat, ToolFormat
from appliance.llamacpp.binding import lib
from appliance.llamacpp.chat.template import ChatTemplate
from appliance.llamacpp.tools.formats import SYNTAXES, find_reasoning_format, find_tool_format, list_markers
from appliance.llamacpp.vocabulary import Vocabulary

_ANY_MODEL: Final[frozenset[Ability]] = frozenset({"completions", "labels", "json_schema", "logprobs"})


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    tools: ToolFormat | None
    """None where the template shows the model no tools, or teaches it a way to call them that we cannot read."""
    reasoning: ReasoningFormat | None
    specials: Mapping[str, int]
    """Markers that are tokens of their own and no letters, by their text."""
    shown: frozenset[int]
    """Those of them that stay invisible unless they are asked for."""
    chat: bool

    @property
    def abilities(self) -> frozenset[Ability]:
        """What this model was found to be able to do, whatever was declared."""
        found = set(_ANY_MODEL)
        if self.chat:
            found |= {"chat", "decisions"}
        if self.tools is not None:
            found.add("tools")
        if self.reasoning is not None:
            found.add("reasoning")
        return frozenset(found)


def find_reply_format(model: Vocabulary, template: ChatTemplate | None, tool_format: ToolFormat | None) -> ReplyFormat:
    source = template.source if template is not None else ""
    taught = template is not None and template.abilities.tools
    tools = (tool_format or find_tool_format(source)) if taught else None
    reasoning = find_reasoning_format(source)
    specials, shown = _tokens_in(model, list_markers(tools, reasoning))
    if tools is not None and SYNTAXES[tools].kind == "harmony":
        reasoning = "harmony"
    return ReplyFormat(tools, reasoning, specials, shown, chat=template is not None)


def _tokens_in(model: Vocabulary, markers: frozenset[str]) -> tuple[Mapping[str, int], frozenset[int]]:
    """Control tokens within the markers, and user-defined ones that look like such: constraints treat both alike."""
    specials: dict[str, int] = {}
    shown: set[int] = set()
    if not markers:
        return specials, frozenset()
    control, own = lib.LLAMA_TOKEN_ATTR_CONTROL, lib.LLAMA_TOKEN_ATTR_USER_DEFINED
    for token in range(model.vocabulary_size):
        attributes = lib.llama_vocab_get_attr(model.vocab_pointer, token)
        if not attributes & (control | own):
            continue
        text = model.piece(token, special=True).decode("utf-8", "replace")
        if not text or not any(text in marker for marker in markers):
            continue
        if attributes & control:
            shown.add(token)
        if attributes & control or (text.startswith("<") and text.endswith(">")):
            specials[text] = token
    return specials, frozenset(shown)
