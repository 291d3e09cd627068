"""Who asks next: calls under way over all batches, shared out fairly among keys and their batches."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class SlotRequest:
    """A batch that wants to ask. `pressing`: it is going to be late."""

    owner: str
    nudge: Callable[[], None]
    """Called when there may be a place for it."""
    pressing: bool = False
    wants: bool = False
    under_way: int = 0


class FairShareSlots:
    """`most` says how many calls may be under way together, as of now. One event loop; nothing here waits."""

    def __init__(self, most: Callable[[], int]) -> None:
        self._most = most
        self._claims: list[SlotRequest] = []
        self._by_owner: Counter[str] = Counter()

    def join(self, owner: str, nudge: Callable[[], None]) -> SlotRequest:
        claim = SlotRequest(owner, nudge)
        self._claims.append(claim)
        return claim

    def part(self, claim: SlotRequest) -> None:
        self._claims.remove(claim)
        self._tell()

    def enter(self, claim: SlotRequest) -> bool:
        """Take a place if there is one and nobody who wants one has less. Whoever gets False is nudged, and should try
        again now and then besides: more places may come."""
        claim.wants = True
        if sum(one.under_way for one in self._claims) >= self._most():
            return False
        if any(self._rank(other) < self._rank(claim) for other in self._claims if other.wants):
            return False
        claim.wants = False
        claim.under_way += 1
        self._by_owner[claim.owner] += 1
        return True

    def leave(self, claim: SlotRequest) -> None:
        claim.under_way -= 1
        self._by_owner[claim.owner] -= 1
        self._tell()

    def _tell(self) -> None:
        for claim in self._claims:
            if claim.wants:
                claim.nudge()

    def _rank(self, claim: SlotRequest) -> tuple[bool, int, int]:
        return not claim.pressing, self._by_owner[claim.owner], claim.under_way
