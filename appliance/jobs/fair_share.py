"""Who asks next: calls under way over all batches, shared out fairly among keys and their batches."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class SlotRequest:
    """A batch that wants to ask. `pressing`: it is going to be late."""

    owner: str
    wake: Callable[[], None]
    """Called when a slot may be free."""
    is_urgent: bool = False
    is_waiting: bool = False
    in_flight: int = 0


class FairShareSlots:
    """`most` says how many calls may be under way together, as of now. One event loop; nothing here waits."""

    def __init__(self, most: Callable[[], int]) -> None:
        self._most = most
        self._requests: list[SlotRequest] = []
        self._by_owner: Counter[str] = Counter()

    def register(self, owner: str, wake: Callable[[], None]) -> SlotRequest:
        slot_request = SlotRequest(owner, wake)
        self._requests.append(slot_request)
        return slot_request

    def unregister(self, slot_request: SlotRequest) -> None:
        self._requests.remove(slot_request)
        self._wake_waiting()

    def try_acquire(self, slot_request: SlotRequest) -> bool:
        """Take a slot if one is free and no waiting batch has fewer.

        A batch that gets False is woken later, and should also try again now and then: the limit may rise.
        """
        slot_request.is_waiting = True
        if sum(one.in_flight for one in self._requests) >= self._most():
            return False
        if any(self._rank(other) < self._rank(slot_request) for other in self._requests if other.is_waiting):
            return False
        slot_request.is_waiting = False
        slot_request.in_flight += 1
        self._by_owner[slot_request.owner] += 1
        return True

    def release(self, slot_request: SlotRequest) -> None:
        slot_request.in_flight -= 1
        self._by_owner[slot_request.owner] -= 1
        self._wake_waiting()

    def _wake_waiting(self) -> None:
        for slot_request in self._requests:
            if slot_request.is_waiting:
                slot_request.wake()

    def _rank(self, slot_request: SlotRequest) -> tuple[bool, int, int]:
        return not slot_request.is_urgent, self._by_owner[slot_request.owner], slot_request.in_flight
