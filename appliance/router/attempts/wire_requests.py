"""What an attempt adds to its requests: a priority for batch work, and a key that marks a repeated request. Pure."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from appliance.core import Request, Target, UpstreamCall
from appliance.wire.dialect import WireRequest

IDEMPOTENCY_HEADER: Final = "idempotency-key"
BATCH_PRIORITY: Final = 1
"""Of batch work, at engines; lower values go first, and everything else has 0."""


def set_priority(request: Request, target: Target, outgoing: Sequence[UpstreamCall]) -> Sequence[UpstreamCall]:
    """Mark batch work for this node's engines, which do everything else before it. A client may lower its own
    priority and cannot raise it."""
    if target.provider is not None:
        return outgoing
    lowest = BATCH_PRIORITY if request.latency_class == "batch" else 0
    return [_with_priority(one, lowest) for one in outgoing]


def add_idempotency_key(request: Request, wire_request: WireRequest) -> WireRequest:
    """A job line that is sent again after a crash carries the same key, for providers that honour it."""
    target = wire_request.target
    if request.latency_class != "batch" or target.location == "onsite":
        return wire_request
    said = f"{request.id}\n{target.name}\n".encode() + wire_request.body
    key = hashlib.sha256(said).hexdigest()[:48]
    return replace(wire_request, headers={**wire_request.headers, IDEMPOTENCY_HEADER: key})


def _with_priority(outgoing: UpstreamCall, lowest: int) -> UpstreamCall:
    given = outgoing.body.get("priority", 0)
    if given == lowest or (type(given) is int and given > lowest):
        return outgoing
    return replace(outgoing, body={**outgoing.body, "priority": lowest})
