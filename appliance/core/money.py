"""What was used, and what that costs."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    """Of the completion."""
    cache_write_tokens: int = 0
    """Of the prompt, not cached before and now put into the provider's cache."""
    cache_write_long_tokens: int = 0
    """Of those, what is kept for an hour."""

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            self.cache_write_tokens + other.cache_write_tokens,
            self.cache_write_long_tokens + other.cache_write_long_tokens,
        )


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens. What is not given falls back to the input price: unknown is never free."""

    input_usd: float
    output_usd: float
    cached_input_usd: float | None = None
    cache_write_usd: float | None = None
    """Of prompt tokens that the provider puts into its cache."""
    cache_write_long_usd: float | None = None
    """Of those that it is to keep for an hour; empty: as `cache_write_usd`."""

    def cost_usd(self, usage: "Usage") -> float:
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        cached_usd = self.input_usd if self.cached_input_usd is None else self.cached_input_usd
        written = min(usage.cache_write_tokens, usage.prompt_tokens - cached)
        long = min(usage.cache_write_long_tokens, written)
        write_usd = self.input_usd if self.cache_write_usd is None else self.cache_write_usd
        long_usd = write_usd if self.cache_write_long_usd is None else self.cache_write_long_usd
        fresh = usage.prompt_tokens - cached - written
        prompt = fresh * self.input_usd + cached * cached_usd + (written - long) * write_usd + long * long_usd
        return (prompt + usage.completion_tokens * self.output_usd) / 1e6

    def times(self, share: float) -> "Price":
        """This price, `share` of it."""
        rest = (self.cached_input_usd, self.cache_write_usd, self.cache_write_long_usd)
        shares = (None if usd is None else usd * share for usd in rest)
        return Price(self.input_usd * share, self.output_usd * share, *shares)
