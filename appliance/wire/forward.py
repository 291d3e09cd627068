"""Requests that travel as they came: from a caller to a target that speaks the same dialect, without a translation.

Each dialect has a `forward` module with the two parts that are its own. A function writes the caller's body for a
target: the target's model, the limits that policy allows, and nothing that we handed out in another provider's name. It
returns None where the request must be translated all the same. A `ForwardedStream` passes the target's events on as
they came and reads usage, the end and errors off them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from appliance.core import Target, UpstreamCall
from appliance.core.json_types import MutableJsonObject
from appliance.wire.dialect import WireRequest
from appliance.wire.stream_passthrough import StreamPassthrough

_LIMITS: Final = ("max_completion_tokens", "max_tokens")


class ForwardedStream(StreamPassthrough):
    """A stream in the caller's own dialect."""

    __slots__ = ("_choices",)

    def __init__(self, request: WireRequest) -> None:
        super().__init__()
        choices = request.outgoing.body.get("n")
        self._choices = choices if isinstance(choices, int) else 1


class ForwardWriter(Protocol):
    def __call__(self, target: Target, outgoing: UpstreamCall, *, stream: bool) -> WireRequest | None:
        """None where the request has to be translated. Raises RequestError where it is no JSON."""


@dataclass(frozen=True, slots=True)
class Forwarder:
    """How requests of one dialect travel as they came."""

    write_request: ForwardWriter
    read_stream: Callable[[WireRequest], ForwardedStream]


def read_limit(outgoing: UpstreamCall) -> int | None:
    """The limit of the answer's length: the caller's, or what policy has made of it."""
    limits = [value for name in _LIMITS if isinstance(value := outgoing.body.get(name), int)]
    return min(limits, default=None)


def has_quirks(target: Target, outgoing: UpstreamCall) -> bool:
    """Whether the request has a field that this target cannot be given; the translation knows what to do about it."""
    names = target.wire.refuses | target.wire.leaves_out
    return any(name in names and value is not None for name, value in outgoing.body.items())


def set_stream(body: MutableJsonObject, *, stream: bool) -> None:
    if stream:
        body["stream"] = True
    elif body.get("stream"):
        del body["stream"]
