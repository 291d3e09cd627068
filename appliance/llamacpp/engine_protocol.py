"""What the dialect asks of the engine and what the engine answers: plain frozen values between two threads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
"""Shape (vocabulary,), natural log scale, not normalised."""

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Constraint(Protocol):
    """Restricts the next token. Used by one sequence only, and only from the engine's thread."""

    def apply(self, logits: Logits) -> None:
        """Set the logits of forbidden tokens to -inf, in place."""

    def accept(self, token: int) -> None:
        """Take note of the token that was chosen."""

    def finished(self) -> bool:
        """True when the text is complete and nothing but the end may follow."""


@runtime_checkable
class LookaheadConstraint(Protocol):
    """A constraint that knows when it leaves no choice."""

    def list_forced_tokens(self) -> list[int]:
        """The tokens that must come next, one after the other; none where there is a choice."""

    def count_allowed(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` may come next, one after the other. Changes nothing."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. OpenAI's names and defaults, plus top_k (0 = off), min_p and repetition_penalty."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One sequence to generate. `n` choices are n of these; they share the prompt by prefix."""

    prompt: Sequence[int]
    """Token ids, the template and BOS included."""
    max_tokens: int
    sampling: Sampling = Sampling()
    logprobs: int | None = None
    """None: no log probabilities. k >= 0: the chosen token's and the k most probable alternatives'."""
    constraint: Constraint | None = None
    ignore_eos: bool = False
    priority: int = 0
    """Lower first."""
    cache_salt: str = ""
    """Prefixes are shared only between requests with equal salts."""
    streamed: bool = True
    """The tokens are read as they come, so pauses between them are noticed."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token. The end-of-generation token itself is never delivered."""

    token: int
    logprob: float | None = None
    """Natural log, of the model's own distribution (temperature 1, before penalties and truncation, after the
    constraint's mask)."""
    top: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True, slots=True)
class SequenceFinished:
    """The end of one sequence; always the last event, also after an error or a cancellation."""

    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that were not computed because a shared prefix held them."""
    completion_tokens: int
    error: str | None = None


@dataclass(frozen=True, slots=True)
class LabelItem:
    """One text to judge: its full prompt (token ids) and the labels that may continue it."""

    prompt: Sequence[int]
    labels: Sequence[Sequence[int]]
    """Token ids of every label as they would follow the prompt. At least one token each."""
    cache_salt: str = ""
    priority: int = 0
    """Lower first. A call is as urgent as the most urgent of its items."""
    tolerance: float = 0.0
    """How far the shares of the labels may be from the exact ones, as total variation, in exchange for speed. 0: every
    label's likelihood is computed to its end."""


@dataclass(frozen=True, slots=True)
class LabelScores:
    """Natural-log likelihood of each label given the prompt (sum over the label's tokens), in the order asked. Labels
    that a tolerance left out have an equal part of what they and others that begin alike have together at most.

    `label_mass` is the probability, between 0 and 1, that the text continues with any of the labels at all.
    """

    logprobs: Sequence[float]
    label_mass: float
    prompt_tokens: int
    cached_tokens: int
    error: str | None = None


@dataclass(frozen=True, slots=True)
class EngineLoadReport:
    """The engine's own view of its work, consistent as of one step."""

    queued_requests: int
    running_sequences: int
    sequences_capacity: int
    queued_prompt_tokens: int
    """Prompt tokens not yet computed, of waiting and of running requests together."""
    remaining_output_tokens: int
    """Upper bound: sum of max_tokens left over running and queued sequences."""
    kv_used_tokens: int
    """Cells held by running sequences, in slots too; what the prefix cache could give back is not counted."""
    kv_cached_tokens: int
    kv_capacity_tokens: int
    """Shared cells and slots together."""
    steps: int
    prefill_tokens_total: int
    decode_tokens_total: int
    prefill_tokens_per_second: float
    """Measured: at start by a short calibration, then corrected by an exponential average over busy steps."""
    decode_tokens_per_second: Mapping[int, float]
    """By number of running sequences (1, 4, 8, ...), over all sequences together."""
    label_items: int = 0
    """Items of label calls that are not answered yet. They are no sequences, and their calls count as queued requests
    only until the first item is taken."""
    drafted_tokens_total: int = 0
    """Tokens that were guessed and computed before they were chosen."""
    accepted_tokens_total: int = 0
    """Of those, the ones that came to be."""
    lane_sequences: int = 0
    """Of the running sequences, those that lie in slots."""
    compute_seconds_total: float = 0.0
    """Time spent in llama.cpp's decode."""
    host_seconds_total: float = 0.0
    """CPU time of the engine's thread outside of that: scheduling, sampling, reading labels."""
