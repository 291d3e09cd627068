"""Text to token ids the way the model was trained: template, BOS, control tokens, and labels as they would follow.

llama.cpp cuts a text at its control tokens and tokenises what lies between on its own. So the tokens of a text are
those of its fragments (each a control token and what follows it) one after the other, and fragments that many
prompts share, such as a long instruction or the head of the assistant's answer, are tokenised once and remembered.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from appliance.core import ToolFormat
from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.errors import RequestError, Unsupported
from appliance.llamacpp.binding import lib
from appliance.llamacpp.chat.message import MessageIn
from appliance.llamacpp.chat.reply_format import find_reply_format
from appliance.llamacpp.chat.template import ChatTemplate
from appliance.llamacpp.kv.prefix_cache import count_shared_prefix
from appliance.llamacpp.vocabulary import Vocabulary

NOT_THINKING: JsonObject = {"enable_thinking": False}
MAX_REMEMBERED_CHARS = 32_768
MAX_REMEMBERED_FRAGMENTS = 512

# Noncharacters, which Unicode keeps out of text, enclose the number of a control token that was only quoted.
_OPEN, _SHUT = "\ufdd0", "\ufdd1"
_QUOTED = re.compile(f"{_OPEN}([0-9]+){_SHUT}")

_PROBE = "\ufdd2"  # stands for a message's content; a noncharacter like those above

# After these a word follows without a space: `{"label": "`, `(`, `key=`, `a/`.
_CLOSING = frozenset(":;,.!?)]}")


@dataclass(frozen=True, slots=True)
class LabelTail:
    """The end of a prompt and the labels that may follow, cut where the tokens of all of them still agree."""

    prompt: tuple[int, ...]
    labels: tuple[tuple[int, ...], ...]


class PromptBuilder:
    """One model's prompts. Stateless but for memory of fragments, so it may be used from several threads."""

    def __init__(
        self, model: Vocabulary, *, template: str | None = None, tool_format: ToolFormat | None = None
    ) -> None:
        """`template` replaces the one in the model's file, `tool_format` what the template teaches."""
        self._model = model
        control = _control_texts(model)
        self._control_texts = sorted(control, key=lambda text: (-len(text), text))
        self._control_numbers = {text: number for number, text in enumerate(self._control_texts)}
        self._control = _alternatives(self._control_texts)
        source = model.metadata.get("tokenizer.chat_template", "") if template is None else template
        bos_text, eos_text = _text(model, model.bos_token), _text(model, model.eos_token)
        self.template = ChatTemplate(source, bos_text=bos_text, eos_text=eos_text) if source else None
        self.reply_format = find_reply_format(model, self.template, tool_format)
        written = [text for text in self._control_texts if text in source or text in (bos_text, eos_text)]
        self._cut = _alternatives(_safe_cuts(written, control))
        self._adds_bos = bool(lib.llama_vocab_get_add_bos(model.vocab_pointer)) and model.bos_token >= 0
        self._remembered = lru_cache(maxsize=MAX_REMEMBERED_FRAGMENTS)(self._fragment_tokens)
        self._after_content = lru_cache(maxsize=64)(self._end_of_turn)
        self.turn_end = self._turn_end()

    def tokenize_raw(self, text: str) -> list[int]:
        """A prompt given as text, no template: control tokens in it count, and BOS stands first if the model has it."""
        return [*self._bos(text), *self.tokenize(text)]

    def tokenize_chat(self, messages: Sequence[MessageIn], tools: Sequence[JsonObject] | None = None) -> list[int]:
        """A conversation up to where the assistant's answer begins."""
        return self.tokenize_raw(self.render(messages, tools))

    def render(
        self,
        messages: Sequence[MessageIn],
        tools: Sequence[JsonObject] | None = None,
        variables: JsonObject | None = None,
    ) -> str:
        """The template's text; control tokens that a message merely quotes are marked as quoted, see `tokens`.

        Without `variables` thinking is switched off where the template has a switch: a label, for one, is read where
        the answer begins.
        """
        if self.template is None:
            raise Unsupported(
                "messages: this model has no chat template; use /v1/completions with a prompt", param="messages"
            )
        plain = [self._plain(position, message) for position, message in enumerate(messages)]
        if variables is None:
            variables = NOT_THINKING if self.template.abilities.switch else {}
        return self.template.render(plain, tools=self._quoted(tools or ()), variables=self._quoted(variables))

    def render_open_turn(self, messages: Sequence[MessageIn]) -> str:
        """The template's text up to the end of the last message's content, its turn left open."""
        return self.render(messages).removesuffix(self._after_content(tuple(one.role for one in messages)))

    def _end_of_turn(self, roles: tuple[str, ...]) -> str:
        """What the template writes after the last message's content; nothing where it does not end with that once."""
        messages = [MessageIn.model_validate({"role": role, "content": "-"}) for role in roles]
        messages[-1] = messages[-1].model_copy(update={"content": _PROBE})
        _, probe, after = self.render(messages).partition(_PROBE)
        return after if probe and _PROBE not in after else ""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a rendered text, without BOS. Equal to `Model.tokenize` of the whole, but remembers fragments.

        Quoted control tokens become the tokens of their letters, so no message can end its turn or open another.
        """
        tokens: list[int] = []
        for fragment in self._fragments(text) if text else ():
            remember = len(fragment) <= MAX_REMEMBERED_CHARS
            tokens.extend(self._remembered(fragment) if remember else self._fragment_tokens(fragment))
        return tokens

    def split_tail(self, text: str, cue: str = "") -> tuple[str, str]:
        """The text before its last control token, and the rest: what a label's tokens may depend on.

        Only the `cue` at its end where the vocabulary splits the text there anyway, so that its labels need not be
        tokenised anew behind every text.
        """
        fragments = self._fragments(text)
        tail = fragments[-1]
        if cue and tail.endswith(cue):
            before = tail.removesuffix(cue)
            if self.tokenize(tail) == [*self.tokenize(before), *self.tokenize(cue)]:
                tail = cue
        return text[: len(text) - len(tail)], tail

    def tokenize_head(self, head: str, tail: str) -> list[int]:
        """BOS, where there is one, and the tokens of all that stands before `tail` (see `split_tail`)."""
        return [*self._bos(head or tail), *self.tokenize(head)]

    def tokenize_labels(self, tail: str, labels: Sequence[str], *, ending: bool) -> LabelTail:
        """Tokens of labels as they would follow `tail` (see `split_tail`).

        A label is tokenised together with the text before it, and what all results share with the tokens of the bare
        tail is the prompt's. So a tail that ends inside a word or in a space is taken back to the last token that the
        labels leave alone, and the labels carry the rest: the tokens the model itself would have written. Where
        a word follows a word or a closing sign (`Category:`), a space is put between, as in written text.

        With `ending`, a label whose tokens begin another label's gets the end of turn, so that "refund" means
        "refund and no more" beside "refund request" and the two exclude each other.
        """
        bare = self.tokenize(tail)
        joined = [self.tokenize(tail + find_joint(tail, label) + label) for label in labels]
        shared = min((count_shared_prefix(bare, tokens) for tokens in joined), default=len(bare))
        rests = [tuple(tokens[shared:]) for tokens in joined]
        if ending and self.turn_end is not None:
            rests = [(*rest, self.turn_end) if any(_begins(rest, other) for other in rests) else rest for rest in rests]
        return LabelTail(tuple(bare[:shared]), tuple(rests))

    def _bos(self, text: str) -> list[int]:
        """Templates of many models write BOS themselves; twice would be a prompt the model never saw."""
        if not self._adds_bos or text.startswith(_text(self._model, self._model.bos_token) or "\0"):
            return []
        return [self._model.bos_token]

    def _fragments(self, text: str) -> list[str]:
        if self._cut is None:
            return [text]
        cuts = [match.start() for match in self._cut.finditer(text)]
        edges = [0, *(cut for cut in cuts if cut), len(text)]
        return [text[start:stop] for start, stop in pairwise(edges)]

    def _fragment_tokens(self, fragment: str) -> tuple[int, ...]:
        if _OPEN not in fragment:
            return tuple(self._model.tokenize(fragment))
        # Control tokens that stand in the text as themselves are the template's; all else here is plain text.
        tokens: list[int] = []
        edge = 0
        for match in self._control.finditer(fragment) if self._control else ():
            tokens += self._plain_tokens(fragment[edge : match.start()])
            tokens += self._model.tokenize(match.group())
            edge = match.end()
        return (*tokens, *self._plain_tokens(fragment[edge:]))

    def _plain_tokens(self, text: str) -> list[int]:
        return self._model.tokenize(_QUOTED.sub(self._unquote, text), special=False) if text else []

    def _unquote(self, match: re.Match[str]) -> str:
        number = int(match.group(1)[:9])
        return self._control_texts[number] if number < len(self._control_texts) else ""

    def _plain(self, position: int, message: MessageIn) -> MutableJsonObject:
        content = message.content
        if isinstance(content, list):
            content = "".join(_part_text(f"messages[{position}].content[{n}]", part) for n, part in enumerate(content))
        return {**self._quoted(message.model_dump(exclude_none=True)), "content": self._quoted(content)}

    def _quoted(self, value: Any) -> Any:
        """The value with every control token in it marked as merely quoted."""
        if self._control is None:
            return value
        if isinstance(value, str):
            return self._control.sub(lambda found: f"{_OPEN}{self._control_numbers[found.group()]}{_SHUT}", value)
        if isinstance(value, list | tuple):
            return [self._quoted(one) for one in value]
        if isinstance(value, Mapping):
            return {self._quoted(key): self._quoted(inner) for key, inner in value.items()}
        return value

    def _turn_end(self) -> int | None:
        """The token that ends an answer: the template's own choice, else the vocabulary's."""
        after = self.template.end_of_turn() if self.template is not None else ""
        tokens = [token for token in self._model.tokenize(after.strip()) if token in self._model.end_tokens]
        if tokens:
            return tokens[0]
        return self._model.eos_token if self._model.eos_token >= 0 else None


def find_joint(before: str, label: str) -> str:
    """What stands between a text and the label that answers it: a space between words of written text, else nothing."""
    if not before or not label or not _is_latin_word(label[0]):
        return ""
    return " " if before[-1] in _CLOSING or _is_latin_word(before[-1]) else ""


def _is_latin_word(character: str) -> bool:
    # From U+2E80 on stand scripts that are written without spaces.
    return character.isalnum() and character < "\u2e80"


def _part_text(place: str, part: JsonObject) -> str:
    kind, text = part.get("type"), part.get("text")
    if kind != "text":
        raise Unsupported(f"{place}: parts of type {kind!r} are not supported by this model; send text", param=place)
    if not isinstance(text, str):
        raise RequestError(f"{place}.text: must be a string, got {text!r:.80}", param=f"{place}.text")
    return text


def _begins(one: Sequence[int], other: Sequence[int]) -> bool:
    return len(one) < len(other) and tuple(other[: len(one)]) == tuple(one)


def _text(model: Vocabulary, token: int) -> str:
    return model.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""


def _control_texts(model: Vocabulary) -> set[str]:
    """Texts of the tokens that steer the model (turns, roles, end) and that users do not mean to write."""
    attribute = lib.llama_vocab_get_attr
    return {
        text
        for token in range(model.vocabulary_size)
        if attribute(model.vocab_pointer, token) & lib.LLAMA_TOKEN_ATTR_CONTROL and (text := _text(model, token))
    }


def _safe_cuts(candidates: Sequence[str], control: set[str]) -> list[str]:
    """Those control tokens that no other can overlap, so that wherever one is found it is one token."""
    return [one for one in candidates if not any(one[0] in other[1:] or other[0] in one[1:] for other in control)]


def _alternatives(texts: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None
