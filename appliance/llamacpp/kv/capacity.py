"""How much of the KV memory is left for new work."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BatchCapacity:
    """KV cells: all, those in use by what runs, and those promised but not yet used."""

    capacity: int
    used: int
    promised: int

    def fits(self, tokens: int) -> bool:
        return self.used + self.promised + tokens <= self.capacity
