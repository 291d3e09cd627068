"""Start-time fair queueing among cache salts, as arithmetic over tokens.

Every piece of work gets a start tag when it arrives: the virtual time, or the end of earlier work with the same salt if
that is later. Work goes by start tag. So a salt with a thousand requests waits behind itself, and a single request of
another goes before all but the first of those. Requests of one salt keep their order.
"""

from typing import Final

_MAX_SALTS: Final = 256
"""Beyond so many, those whose work is over are forgotten; they would be treated as new anyway."""


class FairQueue:
    """Virtual time, in tokens, and where the work of each salt ends on it."""

    def __init__(self) -> None:
        self._now = 0.0
        self._ends: dict[str, float] = {}

    def assign_start_tag(self, cache_salt: str, tokens: int) -> float:
        """The start tag of new work of `tokens`; lower goes first."""
        start_tag = max(self._now, self._ends.get(cache_salt, 0.0))
        self._ends[cache_salt] = start_tag + tokens
        return start_tag

    def advance(self, start_tag: float, tokens: int) -> None:
        """Work of `tokens` begins: virtual time goes on by the share of it that each salt with work has."""
        self._now = max(self._now, start_tag)
        if len(self._ends) > _MAX_SALTS:
            self._ends = {salt: end for salt, end in self._ends.items() if end > self._now}
        active = sum(end > self._now for end in self._ends.values())
        self._now += tokens / max(1, active)
