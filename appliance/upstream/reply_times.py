"""How long a target may take: for a whole reply, and until the first event. Pure."""

from typing import Final

from appliance.core import Target
from appliance.wire.dialect import WireRequest, is_written

_EVENT_BYTES: Final = 150
"""Of an event without its text, at least."""


_SLOWEST_TOKENS_PER_SECOND: Final = 20.0
"""A hosted target that sends its reply whole is silent while it writes; slower than this counts as hung."""


_UNLIMITED_OUTPUT_TOKENS: Final = 8192
"""What a target is given time for that was sent no limit and has none that is known; few replies are longer."""


def whole_reply_seconds(wire_request: WireRequest, expected_tokens: int) -> float:
    """How long a target may be silent before a reply that is not streamed: as long as it may write.

    The limit that was sent counts; `expected_tokens` alone only for calls in whose answer nothing is written. Engines
    of this node are watched by their token progress, so only the total limit holds for them.
    """
    target = wire_request.target
    if target.provider is None:
        return target.limits.total_seconds
    most = wire_request.most_output_tokens
    if most is None:
        most = _UNLIMITED_OUTPUT_TOKENS if is_written(wire_request.outgoing) else 0
    writing = max(most, expected_tokens) / _SLOWEST_TOKENS_PER_SECOND
    return min(target.limits.total_seconds, target.limits.first_byte_seconds + writing)


def first_event_seconds(target: Target) -> float:
    """How long a target may be silent before the first event; long prompts keep a CPU engine busy for minutes."""
    return target.limits.total_seconds if target.provider is None else target.limits.first_byte_seconds
