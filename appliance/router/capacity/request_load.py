"""What a call brings to a target, as admission and the predictions reckon with it."""

from collections.abc import Hashable
from typing import Final

from appliance.core import Request
from appliance.router.capacity.admission import RequestLoad
from appliance.router.stats.estimators import Estimators

_PREFIX_CHARACTERS: Final = 256
"""Prompts that begin alike for so long are taken to share what an engine has cached of them."""


def prefix_of(request: Request) -> Hashable:
    """Engines keep callers' caches apart, so the same words of another caller are not the same beginning."""
    return hash((request.caller.key_id, request.endpoint, request.text[:_PREFIX_CHARACTERS]))


def load_of(
    experience: Estimators,
    request: Request,
    target: str,
    *,
    prefix: Hashable,
    prompt_tokens: int,
    output_tokens: int,
    leaves_free: float,
) -> RequestLoad:
    """What a call of so many tokens, by our estimate and by the caller's limit, brings to `target`."""
    tokens = experience.tokens.correct(target, prompt_tokens)
    expected = experience.output_tokens(target, request.endpoint, output_tokens)
    return RequestLoad(
        experience.uncached_tokens(target, prefix, tokens),
        expected,
        kv_tokens=tokens + expected,
        kind=request.endpoint,
        stream=request.stream,
        leaves_free=leaves_free,
        can_wait=request.latency_class == "batch",
    )
