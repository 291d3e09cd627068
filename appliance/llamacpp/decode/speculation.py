"""Which sequences draft in a step, and how far: as far as it is likely to pay, and without making others wait.

A row more costs what the step grows by. A draft that comes true saves its sequence's share of a whole later step.
"""

from collections.abc import Sequence as Ordered
from typing import Final

from appliance.llamacpp.decode.prompt_lookup import MAX_DRAFT_TOKENS, PerKeyTables, PromptLookup
from appliance.llamacpp.decode.sequence import Sequence
from appliance.llamacpp.rates import Rates

MAX_STEP_GROWTH: Final = 1.0
"""Drafts make a step longer by at most this share while a stream of a sequence in it is read."""
_UNMEASURED_LEAST: Final = 0.5


class SpeculationPlanner:
    """Gives sequences their lookup and counts how many come true. The engine's thread only."""

    def __init__(self, rates: Rates) -> None:
        self._rates, self._tables = rates, PerKeyTables()
        self.drafted_total = self.accepted_total = 0

    def plan_drafts(self, sequences: Ordered[Sequence], free_rows: int, *, has_readers: bool) -> None:
        """Set the `draft` of each of `sequences`, whose next token the step finds; at most `free_rows` tokens in all.

        `has_readers`: a stream of one of them is read.
        """
        least, bound = self._bounds(len(sequences))
        if has_readers:
            free_rows = min(free_rows, bound)
        for sequence in sequences:
            sequence.draft = []
        guesses = [(one, *self._guess(one, least)) for one in sequences if free_rows > 0 and one.sampler.repeatable]
        least = _cutoff([share for _, _, probabilities in guesses for share in probabilities], free_rows)
        for sequence, tokens, probabilities in guesses:
            likely = min(free_rows, sum(share >= least for share in probabilities))
            if likely:
                sequence.set_draft(sequence.sampler.cut_to_allowed(tokens[:likely]))
                free_rows -= len(sequence.draft)
                self.drafted_total += len(sequence.draft)

    def _guess(self, sequence: Sequence, least: float) -> tuple[list[int], list[float]]:
        lookup = sequence.prompt_lookup
        if lookup is None:
            table = self._tables.table_for(sequence.request.cache_salt)
            lookup = sequence.prompt_lookup = PromptLookup(sequence.tokens, sequence.prompt_length, table)
        lookup.observe(sequence.length)
        return lookup.propose(min(MAX_DRAFT_TOKENS, sequence.remaining - 1), least)

    def _bounds(self, sequences: int) -> tuple[float, int]:
        """The least probability that pays, and the most rows that a step with readers may get."""
        known = self._rates.row_seconds(max(1, sequences))
        if known is None:
            return _UNMEASURED_LEAST, MAX_DRAFT_TOKENS
        one_more, average = known
        return one_more / average, int(MAX_STEP_GROWTH * sequences * average / one_more)


def _cutoff(probabilities: list[float], free_rows: int) -> float:
    """The probability from which on guesses fit into `free_rows`, the likeliest first."""
    return sorted(probabilities, reverse=True)[free_rows - 1] if len(probabilities) > free_rows > 0 else 0.0
