"""What a stand-in provider is to say, in no dialect: each of them renders it with the types of its own official SDK."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Finish = Literal["stop", "length", "refusal"]


@dataclass(frozen=True)
class Called:
    """A tool call."""

    id: str = "call_1"
    name: str = "weather"
    arguments: Mapping[str, Any] = field(default_factory=lambda: {"city": "Ulm", "days": 2})


@dataclass(frozen=True)
class Say:
    """One answer. `prompt_tokens` counts all of the prompt, `output_tokens` all that is billed as output."""

    text: str = ""
    thought: str = ""
    calls: Sequence[Called] = ()
    finish: Finish = "stop"
    refusal: str = ""
    prompt_tokens: int = 20
    cached_tokens: int = 0
    written_tokens: int = 0
    written_long_tokens: int = 0
    output_tokens: int = 9
    thought_tokens: int = 0

    @property
    def pieces(self) -> Sequence[str]:
        """The text as a stream brings it."""
        return pieces_of(self.text)


@dataclass(frozen=True)
class Fail:
    """An error instead of an answer. `kind` is the provider's own word for it; `late`: in the middle of a stream."""

    status: int
    kind: str
    message: str = "something is wrong"
    headers: Mapping[str, str] = field(default_factory=dict)
    late: bool = False


@dataclass(frozen=True)
class Cut:
    """An answer whose stream ends in the middle without a word."""

    text: str = "half of an ans"


def pieces_of(text: str) -> Sequence[str]:
    """Three pieces, cut without regard to words."""
    third = max(1, -(-len(text) // 3))
    return [text[at : at + third] for at in range(0, len(text), third)]


HELLO = Say(text="The answer is forty two, naïvely — 42 ✓.")
CALLS = Say(calls=(Called(),))
TWO_CALLS = Say(text="Let me look.", calls=(Called(), Called("call_2", "clock", {})))
THINKS = Say(text="It rains.", thought="Clouds are grey.", output_tokens=30, thought_tokens=21)
THINKS_AND_CALLS = Say(thought="I must look.", calls=(Called(),), output_tokens=25, thought_tokens=12)
SHORT = Say(text="Once upon a", finish="length")
REFUSES = Say(finish="refusal", refusal="I will not help with that.")
CACHED = Say(text="Yes.", prompt_tokens=1000, cached_tokens=600, written_tokens=300, written_long_tokens=100)
