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
from typing import Any, Final, Protocol

from appliance.core import Target, UpstreamCall, Usage

_WRITING: Final = ("/chat/completions", "/completions")
_LIMITS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens", "maxOutputTokens")


@dataclass(frozen=True, slots=True)
class WireRequest:
    """One request as it goes over the wire, with what it was made from."""

    target: Target
    outgoing: UpstreamCall
    path: str
    """Below the target's address, with its query."""
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    most_output_tokens: int | None = None
    """The most that the target may write in answer, all choices together; None where nobody knows."""


def is_written(outgoing: UpstreamCall) -> bool:
    """Whether text is generated in answer to it, as long as its limits allow."""
    return outgoing.path in _WRITING


def most_output_tokens(target: Target, outgoing: UpstreamCall, body: Mapping[str, Any]) -> int | None:
    """By `body` as it was written for `target`, whatever the dialect; where it sets no limit, the one that is known of
    the model."""
    if not is_written(outgoing):
        return None
    config = body.get("generationConfig")
    settings = config if isinstance(config, Mapping) else body
    limits = [value for name in _LIMITS if isinstance(value := settings.get(name), int)]
    limit = max(limits, default=target.wire.max_output_tokens)
    choices = settings.get("n") or settings.get("candidateCount") or 1
    return None if limit is None else limit * (choices if isinstance(choices, int) else 1)


class StreamTranslator(Protocol):
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

    def write(self, target: Target, outgoing: UpstreamCall, *, stream: bool, salt: str) -> WireRequest:
        """Raises Unsupported naming the field that cannot be carried over, RequestError where it is no JSON."""

    def read(self, letter: WireRequest, payload: dict[str, Any]) -> tuple[dict[str, Any], Usage]:
        """A whole reply in OpenAI's shape. Raises BackendGarbage where it is not what the dialect promises."""

    def passage(self, letter: WireRequest) -> StreamTranslator: ...
