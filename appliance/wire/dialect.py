"""What a dialect is to the rest of the appliance: a record of functions, for both directions.

Inbound is what a caller speaks to us, outbound what we speak to a target. `registry` has the table of all dialects.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from appliance.core import Endpoint, Target, UpstreamCall, Usage
from appliance.core.json_types import JsonObject
from appliance.errors import ApplianceError
from appliance.wire.chat_fields import dump_body
from appliance.wire.chat_ir import ChatBody
from appliance.wire.streams import StreamStart, StreamTranslator, StreamWriter

CHAT_PATH: Final = "/chat/completions"
_WRITING: Final = (CHAT_PATH, "/completions")
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
    """The most that the target may write in answer, all choices together; None where it is not known."""
    is_forwarded: bool = False
    """Whether the body is the caller's own, and so the answer goes back as it comes."""


def is_written(outgoing: UpstreamCall) -> bool:
    """Whether text is generated in answer to it, as long as its limits allow."""
    return outgoing.path in _WRITING


def most_output_tokens(target: Target, outgoing: UpstreamCall, body: JsonObject) -> int | None:
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


def make_wire_request(
    target: Target, outgoing: UpstreamCall, path: str, body: JsonObject, *, is_forwarded: bool = False
) -> WireRequest:
    """`body` as it was written for `target`. Raises RequestError where it cannot be written as JSON."""
    most = most_output_tokens(target, outgoing, body)
    return WireRequest(target, outgoing, path, dump_body(target, body), dict(target.wire.headers), most, is_forwarded)


def add_query(target: Target, path: str) -> str:
    return f"{path}?{target.wire.query}" if target.wire.query else path


@dataclass(frozen=True, slots=True)
class InboundDialect:
    """What callers speak. All of it is pure."""

    endpoint: Endpoint
    path: str | None
    """Where its requests come in; None where the path names the model and the action."""
    read_chat: Callable[[JsonObject], ChatBody]
    """Check a body and translate it. Raises RequestError naming field, value and remedy."""
    read_count: Callable[[JsonObject], ChatBody]
    """The same for a request whose prompt tokens are only counted."""
    write_reply: Callable[[JsonObject, JsonObject], JsonObject]
    """The reply for a chat completion and the body that asked. Raises BackendGarbage."""
    write_stream: Callable[[StreamStart], StreamWriter]


class RequestWriter(Protocol):
    def __call__(self, target: Target, outgoing: UpstreamCall, *, stream: bool, salt: str) -> WireRequest:
        """Raises Unsupported naming the field that cannot be carried over, RequestError where it is no JSON."""


@dataclass(frozen=True, slots=True)
class OutboundDialect:
    """What targets speak. Pure, but for the time that replies are stamped with."""

    write_request: RequestWriter
    read_reply: Callable[[WireRequest, JsonObject], tuple[JsonObject, Usage]]
    """A whole reply as a chat completion. Raises BackendGarbage where it is not what the dialect promises."""
    translate_stream: Callable[[WireRequest], StreamTranslator]


@dataclass(frozen=True, slots=True)
class WireDialect:
    """One row of the registry."""

    name: str
    inbound: InboundDialect | None
    """None for the chat dialect itself, whose bodies and replies travel as they are."""
    outbound: OutboundDialect
    write_error: Callable[[ApplianceError, str | None], JsonObject]
    """The body of an error response, with the id of the request."""
    error_status: Callable[[ApplianceError], int]
