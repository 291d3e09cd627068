"""The result of a call whose reply goes to the client as it came."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from appliance.core import Usage


@dataclass(frozen=True, slots=True)
class ReplyResult:
    """A TaskResult: `payload` is the target's JSON, untouched."""

    payload: Any
    usage: Usage = field(default_factory=Usage)

    @property
    def confidence(self) -> float | None:
        """The least average token probability (geometric) among choices with logprobs; None where none has any."""
        choices = self.payload.get("choices") if isinstance(self.payload, dict) else None
        found = (_average_probability(choice) for choice in choices) if isinstance(choices, list) else ()
        return min((one for one in found if one is not None), default=None)

    @property
    def label_mass(self) -> float | None:
        return None


def _average_probability(choice: Any) -> float | None:
    logprobs = list(_iter_logprobs(choice))
    return math.exp(math.fsum(logprobs) / len(logprobs)) if logprobs else None


def _iter_logprobs(choice: Any) -> Iterator[float]:
    logprobs = choice.get("logprobs") if isinstance(choice, dict) else None
    rows = logprobs.get("content") if isinstance(logprobs, dict) else None
    for row in rows or ():
        value = row.get("logprob") if isinstance(row, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield value
