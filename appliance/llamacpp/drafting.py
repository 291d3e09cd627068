"""Which sequences draft in a step, and how far: as far as it is likely to pay, and without making others wait.

A row more costs what the step grows by. A draft that comes true saves its sequence's share of a whole later step.
"""

from collections.abc import Sequence as Ordered
from typing import Final

from appliance.llamacpp.drafts import LONGEST, Drafts, Tenants
from appliance.llamacpp.rates import Rates
from appliance.llamacpp.sequence import Sequence

GROWTH: Final = 0.5
"""Drafts make a step with several sequences longer by at most this share."""
_UNMEASURED_LEAST: Final = 0.5


class Drafting:
    """Gives sequences their drafts and counts how many come true. The engine's thread only."""

    def __init__(self, rates: Rates) -> None:
        self._rates, self._tenants = rates, Tenants()
        self.drafted_total = self.accepted_total = 0

    def plan(self, sequences: Ordered[Sequence], room: int) -> None:
        """Set the `draft` of each of `sequences`, whose next token the step finds; at most `room` tokens in all."""
        least, bound = self._bounds(len(sequences))
        room = min(room, bound)
        for sequence in sequences:
            sequence.draft = []
            most = min(LONGEST, room, sequence.remaining - 1)
            if most > 0 and sequence.sampler.repeatable:
                sequence.guess(self._guess(sequence, most, least))
                room -= len(sequence.draft)
                self.drafted_total += len(sequence.draft)

    def _guess(self, sequence: Sequence, most: int, least: float) -> list[int]:
        drafts = sequence.drafts
        if drafts is None:
            habits = self._tenants.of(sequence.request.cache_salt)
            drafts = sequence.drafts = Drafts(sequence.tokens, sequence.prompt_length, habits)
        drafts.read(sequence.length)
        guessed = drafts.guess(most, least)
        return sequence.sampler.allowed(guessed) if guessed else guessed

    def _bounds(self, sequences: int) -> tuple[float, int]:
        """The least probability that pays, and the most rows that drafts may add."""
        known = self._rates.row_seconds(max(1, sequences))
        if known is None:
            return _UNMEASURED_LEAST, LONGEST
        one_more, average = known
        if sequences <= 1:
            return one_more / average, LONGEST
        return one_more / average, int(GROWTH * sequences * average / one_more)
