"""Whose turn it is: start-time fair queueing among tenants, as arithmetic over tokens.

Every piece of work gets a place when it arrives: the virtual time, or where the tenant's own earlier work ends if that
is later. Work goes by place, so a tenant with a thousand requests waits behind itself, and one that sends a single
request goes before all but the first of those. Requests of one tenant keep their order.
"""

from typing import Final

_TENANTS_REMEMBERED: Final = 256
"""Beyond so many, those whose work is over are forgotten; they would be treated as new anyway."""


class FairQueue:
    """Virtual time, in tokens, and where each tenant's work ends on it."""

    def __init__(self) -> None:
        self._now = 0.0
        self._ends: dict[str, float] = {}

    def assign_start_tag(self, tenant: str, tokens: int) -> float:
        """The place of new work of `tokens`; lower goes first."""
        place = max(self._now, self._ends.get(tenant, 0.0))
        self._ends[tenant] = place + tokens
        return place

    def advance(self, place: float, tokens: int) -> None:
        """The work of `tokens` at `place` is begun: time goes on by what each of the tenants with work has of it."""
        self._now = max(self._now, place)
        if len(self._ends) > _TENANTS_REMEMBERED:
            self._ends = {tenant: end for tenant, end in self._ends.items() if end > self._now}
        active = sum(end > self._now for end in self._ends.values())
        self._now += tokens / max(1, active)
