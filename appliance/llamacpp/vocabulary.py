"""What is needed of a model to turn text into tokens and back."""

from collections.abc import Mapping
from typing import Any, Protocol


class Vocabulary(Protocol):
    """What is needed of `Model` here; safe from any thread."""

    vocab_pointer: Any
    vocabulary_size: int
    bos_token: int
    eos_token: int
    end_tokens: frozenset[int]
    metadata: Mapping[str, str]

    def tokenize(self, text: str, *, special: bool = True, bos: bool = False) -> list[int]: ...

    def piece(self, token: int, *, special: bool = False) -> bytes: ...
