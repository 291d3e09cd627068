"""One request's sequence while it waits, runs, is put back and runs again. Owned by the engine's thread."""

from dataclasses import dataclass, field

import numpy as np

from appliance.llamacpp.decode.prompt_lookup import PromptLookup
from appliance.llamacpp.decode.sampling import Sampler
from appliance.llamacpp.engine_protocol import FinishReason, SequenceFinished, SequenceRequest, TokenEvent
from appliance.llamacpp.kv.prefix_cache import PrefixNode, Tokens, to_token_array


@dataclass(eq=False, slots=True)
class Sequence:
    """`tokens[:length]` are prompt and output so far; the first `computed` of them lie in KV memory.

    The first `shared` cells belong to the prefix tree, down to the pinned `node`; the others are this sequence's own.
    It lies in the shared memory under `id`, or in a `slot`, or, while it waits, nowhere (both -1).
    """

    request: SequenceRequest
    number: int
    """Order of arrival; unique."""
    sampler: Sampler
    limit: int
    """Length at which generation ends: prompt + max_tokens, or the end of the context."""
    tokens: Tokens
    length: int
    start_tag: float = 0.0
    """Its place in the fair order; see `fair_queue`."""
    id: int = -1
    slot: int = -1
    computed: int = 0
    shared: int = 0
    node: PrefixNode | None = None
    prompt_lookup: PromptLookup | None = None
    """Guesses of what comes next; made when it first may draft."""
    draft: list[int] = field(default_factory=list)
    """What the current step computes after its last token. `tokens` holds it too, behind `length`."""
    cached_tokens: int | None = None
    """Set when the sequence is first admitted."""
    events: list[TokenEvent] = field(default_factory=list)
    """Not delivered yet."""
    finished: SequenceFinished | None = None
    dropped: bool = False
    """Its caller has left. Set by the event loop's thread before the engine's takes note."""

    @classmethod
    def from_request(
        cls, request: SequenceRequest, number: int, context_tokens: int, end_tokens: frozenset[int]
    ) -> "Sequence":
        prompt = to_token_array(request.prompt)
        limit = min(len(prompt) + request.max_tokens, context_tokens)
        tokens = np.empty(limit, np.int32)
        tokens[: len(prompt)] = prompt
        forbidden = end_tokens if request.ignore_eos else frozenset[int]()
        sampler = Sampler(request.sampling, request.logprobs, request.constraint, forbidden)
        return cls(request, number, sampler, limit, tokens, len(prompt))

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        return self.length - len(self.request.prompt)

    @property
    def remaining(self) -> int:
        """Output tokens it may still produce."""
        return self.limit - self.length

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be chosen; 1 while it is generating."""
        return self.length - self.computed

    @property
    def rank(self) -> tuple[int, float, int]:
        """Lower goes first: by priority value, then start tag, then order of arrival."""
        return self.request.priority, self.start_tag, self.number

    @property
    def running(self) -> bool:
        return self.id >= 0 or self.slot >= 0

    @property
    def private_cells(self) -> int:
        """Cells of the shared memory that only this sequence holds."""
        return self.computed - self.shared if self.slot < 0 else 0

    def append(self, event: TokenEvent) -> None:
        self.tokens[self.length] = event.token
        self.length += 1
        self.events.append(event)

    def set_draft(self, tokens: list[int]) -> None:
        """Let the step compute `tokens` as if they came next; at most as many as `remaining` less the one before."""
        self.draft = tokens
        self.tokens[self.length : self.length + len(tokens)] = tokens

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        self.finished = SequenceFinished(reason, self.prompt_length, self.cached_tokens or 0, self.generated, error)
