"""What the program reports of its work in `/load`: the CPU engine's fields, for a program without cache and output."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_KEPT_SHARE: Final = 0.9
"""Of what was measured before, when a new call is added: about the last twenty calls count."""
SEQUENCES_CAPACITY: Final = 16
"""Calls that the router may send at once; a setting, not a measurement."""
NO_KV_LIMIT: Final = 1_000_000_000
"""No call is ever refused for its cache: there is none."""


@dataclass(frozen=True, slots=True)
class EncoderLoadReport:
    """The fields are those of `appliance.core.EngineLoad`. Speeds are measured; 0 and empty until something was."""

    running_sequences: int
    steps: int
    prefill_tokens_total: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: Mapping[str, float]
    """What a call answers comes with its last input token, so an answer is as fast as the prompt."""
    sequences_capacity: int = SEQUENCES_CAPACITY
    queued_requests: int = 0
    queued_prompt_tokens: int = 0
    remaining_output_tokens: int = 0
    kv_used_tokens: int = 0
    kv_cached_tokens: int = 0
    kv_capacity_tokens: int = NO_KV_LIMIT
    decode_tokens_total: int = 0


class SpeedMeter:
    """Tokens a second over all models and classifiers, weighted by the time they took. Safe from threads."""

    def __init__(self) -> None:
        self.tokens_total = 0
        self._tokens = self._seconds = 0.0
        self._lock = threading.Lock()

    def observe(self, tokens: int, seconds: float) -> None:
        """Add one call."""
        with self._lock:
            self.tokens_total += tokens
            self._tokens = _KEPT_SHARE * self._tokens + tokens
            self._seconds = _KEPT_SHARE * self._seconds + seconds

    @property
    def tokens_per_second(self) -> float:
        """0 until a call was measured."""
        with self._lock:
            return self._tokens / self._seconds if self._seconds > 0 else 0.0
