"""A wire dialect: how a request in OpenAI's shape is written for a target, and its answer read back into that shape.

Inside the appliance everything is a chat completion of OpenAI's. Three fields of a message go beyond it, so that a
conversation with tools can be continued with a model that thinks:

`reasoning_content` (text): what the model thought, as far as it shows it. Never sent back by itself.
`thinking_blocks` (list): what the provider wants back with the next request, as it came: Anthropic's `thinking` and
    `redacted_thinking` blocks, and `reasoning` items of OpenAI's Responses API. A dialect sends back its own alone:
    those of another are another model's private matter, and mean nothing to it.
`extra_content.google.thought_signature` (text, on a message or a tool call): the same for Gemini, where Google's own
    OpenAI-compatible endpoint puts it.

Hints of caching (`cache_control`, `prompt_cache_key`, `prompt_cache_breakpoint` ...) and an image's `detail` are
carried over where the dialect has them and left out elsewhere: no answer is wrong without them. All else that cannot be
carried over is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from appliance.core import Outgoing, Target, Usage


@dataclass(frozen=True, slots=True)
class Letter:
    """One request as it goes over the wire, with what it was made from."""

    target: Target
    outgoing: Outgoing
    path: str
    """Below the target's address, with its query."""
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class Passing(Protocol):
    """The bytes of one stream in passing: what comes in is the target's, what goes out are events of OpenAI's."""

    usage: Usage | None
    error: Any
    """The error object of an error event; nothing after it is passed on, nor is the event itself."""
    done: bool
    """Whether the end of the stream came and was passed on."""
    finished_choices: int

    def feed(self, chunk: bytes) -> bytes:
        """Take what the socket had, return complete events (maybe none). Raises EventTooLong."""

    def end(self) -> bytes:
        """The bytes are over: what is still to be passed on."""


class Dialect(Protocol):
    """Pure, but for the time that replies are stamped with."""

    def write(self, target: Target, outgoing: Outgoing, *, stream: bool, salt: str) -> Letter:
        """Raises Unsupported naming the field that cannot be carried over, RequestError where it is no JSON."""

    def read(self, letter: Letter, payload: dict[str, Any]) -> tuple[dict[str, Any], Usage]:
        """A whole reply in OpenAI's shape. Raises BackendGarbage where it is not what the dialect promises."""

    def passage(self, letter: Letter) -> Passing: ...
