"""How an attempt's calls are written for whoever is to answer them: in their turn, and so that one that is sent again
can be told to be the same. Pure."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from appliance.core import Request, Target, UpstreamCall
from appliance.wire.dialect import WireRequest

IDEMPOTENCY_HEADER: Final = "idempotency-key"
BATCH_PRIORITY: Final = 1
"""Of work that can wait, at engines; lower values go first, and everything else has 0."""


def in_turn(request: Request, target: Target, outgoing: Sequence[UpstreamCall]) -> Sequence[UpstreamCall]:
    """Work that can wait is marked so for this node's engines, which do everything else before it. Whoever asks may let
    others go first, and cannot go before them."""
    if target.provider is not None:
        return outgoing
    first = BATCH_PRIORITY if request.latency_class == "batch" else 0
    return [_not_before(one, first) for one in outgoing]


def sealed_once(request: Request, letter: WireRequest) -> WireRequest:
    """A line of a job that is sent again after a crash says that it is the same, for providers that look."""
    target = letter.target
    if request.latency_class != "batch" or target.location == "onsite":
        return letter
    said = f"{request.id}\n{target.name}\n".encode() + letter.body
    key = hashlib.sha256(said).hexdigest()[:48]
    return replace(letter, headers={**letter.headers, IDEMPOTENCY_HEADER: key})


def _not_before(outgoing: UpstreamCall, first: int) -> UpstreamCall:
    given = outgoing.body.get("priority", 0)
    if given == first or (type(given) is int and given > first):
        return outgoing
    return replace(outgoing, body={**outgoing.body, "priority": first})
