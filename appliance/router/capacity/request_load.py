"""What a call adds to a target's load, as admission and the predictor count it."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

from appliance.core import Request
from appliance.router.stats.estimators import Estimators

_PREFIX_CHARACTERS: Final = 256
"""Prompts that begin alike for so long are taken to share what an engine has cached of them."""


@dataclass(frozen=True, slots=True)
class RequestLoad:
    """What one call adds to a target's load."""

    prompt_tokens: int
    """To be computed: without those expected in the cache."""
    output_tokens: int
    """Expected: the caller's limit is seldom reached."""
    share: int = 1
    """How many sequences it occupies."""
    kv_tokens: int | None = None
    """KV cells it may come to hold, where that is more than the two together."""
    kind: str = ""
    """Kind of work, for example the endpoint: predictions are corrected for each kind by itself."""
    stream: bool = False
    reserved_share: float = 0.0
    """Share of the engine that it leaves to residency-bound requests, while it can fall back itself."""
    is_batch: bool = False
    """Batch work enters only where it slows no interactive request, and the engine preempts it for those."""

    @property
    def cells(self) -> int:
        return self.prompt_tokens + self.output_tokens if self.kv_tokens is None else self.kv_tokens


def prompt_prefix_key(request: Request) -> Hashable:
    """Equal for prompts of one caller that begin alike: engines keep callers' caches apart."""
    return hash((request.caller.key_id, request.endpoint, request.text[:_PREFIX_CHARACTERS]))


def make_request_load(
    estimators: Estimators,
    request: Request,
    target: str,
    *,
    prefix: Hashable,
    prompt_tokens: int,
    output_tokens: int,
    reserved_share: float,
) -> RequestLoad:
    """The load of a call at `target`, from the estimated prompt tokens and the caller's output limit."""
    tokens = estimators.tokens.correct(target, prompt_tokens)
    expected = estimators.output_tokens(target, request.endpoint, output_tokens)
    return RequestLoad(
        estimators.uncached_tokens(target, prefix, tokens),
        expected,
        kv_tokens=tokens + expected,
        kind=request.endpoint,
        stream=request.stream,
        reserved_share=reserved_share,
        is_batch=request.latency_class == "batch",
    )
