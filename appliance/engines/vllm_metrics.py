"""vLLM's `/metrics` as the load of an engine. Pure but for what it remembers between two pages.

Its gauges move only when the engine steps: they lag, and of a hung engine they say 0. They correct the router's own
ledger, which is the load signal; whether the engine computes at all is shown by its counters, or by a probe.
"""

import re
from collections.abc import Mapping
from typing import Final

from appliance.core import EngineLoad
from appliance.errors import BackendGarbage

_COUNTED: Final = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prompt_tokens_total",
    "prompt_tokens_cached_total",
    "generation_tokens_total",
    "iteration_tokens_total_count",
    "request_prompt_tokens_sum",
    "request_prompt_tokens_count",
    "request_generation_tokens_sum",
    "request_generation_tokens_count",
    "request_prefill_time_seconds_sum",
    "request_decode_time_seconds_sum",
)
_ROW: Final = re.compile(rf"^vllm:({'|'.join(_COUNTED)})\{{[^}}\n]*\}} (\S+)$", re.MULTILINE)
_CACHE: Final = re.compile(r"^vllm:cache_config_info\{([^}\n]*)\}", re.MULTILINE)
_CACHE_TOKENS: Final = re.compile(r'kv_cache_size_tokens="(\d+)"')

_LEAST_PROMPT_TOKENS: Final = 64
"""Shorter prompts are mostly overhead: their rate would be far too low for longer ones."""
_LEAST_WRITTEN_TOKENS: Final = 16
_LEAST_SECONDS: Final = 0.2
_WEIGHT: Final = 0.3
"""Of the newest reading, against all before it."""
_MOST_COUNTS: Final = 64


class VllmMetrics:
    """Reads pages of one run of one engine."""

    path = "/metrics"

    def __init__(self, sequences: int, kv_capacity_tokens: int) -> None:
        """`kv_capacity_tokens` holds until the engine tells its own."""
        self._sequences, self._kv_tokens = sequences, kv_capacity_tokens
        self._before: tuple[float, Mapping[str, float]] | None = None
        self._prefill_rate = 0.0
        self._decode_rates: dict[int, float] = {}

    def read(self, page: str, now: float) -> EngineLoad:
        values = _values(page)
        if "iteration_tokens_total_count" not in values or "num_requests_running" not in values:
            raise BackendGarbage("the engine's /metrics has no counters of vLLM's")
        cells = [int(found[1]) for row in _CACHE.findall(page) if (found := _CACHE_TOKENS.search(row))]
        self._kv_tokens = sum(cells) or self._kv_tokens
        self._learn(values, now)
        self._before = (now, values)
        running, waiting = int(values["num_requests_running"]), int(values.get("num_requests_waiting", 0))
        prompt = _mean(values, "request_prompt_tokens")
        output = _mean(values, "request_generation_tokens")
        cached = int(values.get("prompt_tokens_cached_total", 0))
        share = values.get("kv_cache_usage_perc", 0.0) / max(1, len(cells))
        return EngineLoad(
            queued_requests=waiting,
            running_sequences=running,
            sequences_capacity=self._sequences,
            queued_prompt_tokens=int(waiting * prompt),
            remaining_output_tokens=int((running / 2 + waiting) * output),
            kv_used_tokens=int(min(1.0, share) * self._kv_tokens),
            kv_cached_tokens=0,
            kv_capacity_tokens=self._kv_tokens,
            steps=int(values["iteration_tokens_total_count"]),
            prefill_tokens_total=max(0, int(values.get("prompt_tokens_total", 0)) - cached),
            decode_tokens_total=int(values.get("generation_tokens_total", 0)),
            prefill_tokens_per_second=self._prefill_rate,
            decode_tokens_per_second=dict(self._decode_rates),
        )

    def _learn(self, values: Mapping[str, float], now: float) -> None:
        """Rates, from what changed since the last page."""
        then, before = self._before or (now, dict.fromkeys(values, 0.0))
        grown = {name: value - before.get(name, 0.0) for name, value in values.items()}
        if min(grown.get("generation_tokens_total", 0), grown.get("prompt_tokens_total", 0)) < 0:
            return  # it has been started anew
        computed = grown.get("prompt_tokens_total", 0) - grown.get("prompt_tokens_cached_total", 0)
        seconds = grown.get("request_prefill_time_seconds_sum", 0)
        if computed >= _LEAST_PROMPT_TOKENS and seconds > 0:
            self._prefill_rate = _blend(self._prefill_rate, computed / seconds)
        self._seed(values, grown)
        running = int(min(before.get("num_requests_running", 0), values["num_requests_running"]))
        written = grown.get("generation_tokens_total", 0)
        has_room = running in self._decode_rates or len(self._decode_rates) < _MOST_COUNTS
        if running and written > 0 and now - then >= _LEAST_SECONDS and has_room:
            rate = _blend(self._decode_rates.get(running, 0.0), written / (now - then))
            self._decode_rates[running] = rate

    def _seed(self, values: Mapping[str, float], grown: Mapping[str, float]) -> None:
        """A first rate of writing, from requests that have ended: they may have been too short to be seen running."""
        seconds, tokens = (
            grown.get("request_decode_time_seconds_sum", 0.0),
            grown.get("request_generation_tokens_sum", 0),
        )
        if not self._decode_rates and seconds > 0 and tokens >= _LEAST_WRITTEN_TOKENS:
            count = max(1, int(values["num_requests_running"]))
            self._decode_rates[count] = count * tokens / seconds


def _values(page: str) -> dict[str, float]:
    """Sums over the engines of one server (there are several with data parallelism)."""
    values: dict[str, float] = {}
    for name, text in _ROW.findall(page):
        try:
            values[name] = values.get(name, 0.0) + float(text)
        except ValueError as error:
            raise BackendGarbage(f"the engine's /metrics says {name} is {text!r}") from error
    return values


def _mean(values: Mapping[str, float], name: str) -> float:
    count = values.get(f"{name}_count", 0.0)
    return values.get(f"{name}_sum", 0.0) / count if count else 0.0


def _blend(before: float, new: float) -> float:
    return new if before == 0 else before + _WEIGHT * (new - before)
