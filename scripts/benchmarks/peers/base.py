"""What a contender offers: a way to start it, and its own ways of doing each work."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from scripts.benchmarks.peers.installing import Say
from scripts.benchmarks.peers.processes import Server, Setup
from scripts.benchmarks.workloads import Decisions, Receipts


@dataclass(frozen=True, slots=True)
class Decided:
    """The chosen label for every text, in order, and the tokens that it took where the server tells."""

    labels: Sequence[str]
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Method(Protocol):
    """One way to make decisions."""

    async def __call__(self, server: Server, work: Decisions, concurrency: int) -> Decided: ...


class Peer(Protocol):
    name: str
    methods: Mapping[str, Method]
    any_length: Mapping[str, Any]
    """Fields of a chat that make it generate on, past the end of an answer."""

    def prepare(self, say: Say) -> None:
        """Install what is missing. Raises PeerMissing."""

    @property
    def start(self) -> Callable[[Setup], AbstractAsyncContextManager[Server]]:
        """Run it until the block ends. Raises PeerMissing."""

    async def extract(self, server: Server, work: Receipts, concurrency: int) -> Sequence[bool]:
        """For every document whether the answer is valid, in order."""


def label_of(work: Decisions, said: str | None) -> str:
    """The label that was said, in full or by its code. Raises RuntimeError where it is none of them."""
    word = (said or "").strip()
    if word in work.labels:
        return word
    if work.codes is not None and word in work.codes:
        return work.labels[work.codes.index(word)]
    raise RuntimeError(f"{said!r} is none of the labels")


def label_read(work: Decisions, probabilities: Mapping[int, float]) -> str:
    """The label whose token is the most probable."""
    read = [probabilities.get(token, float("-inf")) for token in work.read_tokens]
    if max(read) == float("-inf"):
        raise RuntimeError("no label's token was read")
    return work.labels[read.index(max(read))]
