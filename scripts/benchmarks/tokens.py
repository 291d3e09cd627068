"""The benchmarked model's tokenizer, read from its GGUF without its weights, and texts of an exact length."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import llama_cpp.llama_cpp as lib

FILLERS = (" today", " again", " please", " now", " there", " still", " here", " then")
"""Words of one token each."""

Messages = Sequence[Mapping[str, str]]


class Tokens:
    """Counts tokens as the servers do. The chat template is ChatML, which this model family uses."""

    def __init__(self, model: Path) -> None:
        self._silence = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self._silence, ctypes.c_void_p(0))
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.vocab_only = True
        handle = lib.llama_model_load_from_file(str(model).encode(), params)
        if not handle:
            raise SystemExit(f"{model} cannot be read: name another GGUF with --model")
        self._vocabulary = lib.llama_model_get_vocab(handle)
        self.end_token: int = lib.llama_vocab_eos(self._vocabulary)

    def ids(self, text: str) -> list[int]:
        data = text.encode()
        room = len(data) + 4
        buffer = (lib.llama_token * room)()
        count = lib.llama_tokenize(self._vocabulary, data, len(data), buffer, room, False, True)
        return list(buffer[:count])

    def count(self, messages: Messages) -> int:
        """Tokens of a chat, the opening of the answer included."""
        return len(self.ids(chatml(messages)))


def chatml(messages: Messages) -> str:
    turns = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages)
    return f"{turns}<|im_start|>assistant\n"


def chat(system: str, user: str) -> Messages:
    return ({"role": "system", "content": system}, {"role": "user", "content": user})


def fitted(text: str, wanted: int, count: Callable[[str], int]) -> str:
    """`text`, cut at its end or filled up, so that `count` of it is `wanted`. Raises ValueError where that fails."""
    words = text.split(" ")
    low, high = 1, len(words)
    while low < high:  # the most words that do not exceed it
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(" ".join(words[:middle])) <= wanted else (low, middle - 1)
    for kept in range(low, max(0, low - 8), -1):  # where words merge, fewer of them may fit exactly
        start = " ".join(words[:kept])
        for number in range(wanted - count(start) + 1):
            found = start + filling(number)
            if count(found) == wanted:
                return found
    raise ValueError(f"{text[:60]!r} cannot be made {wanted} tokens long")


def filling(tokens: int) -> str:
    """Words that are so many tokens when they follow others."""
    return "".join(FILLERS[number % len(FILLERS)] for number in range(tokens))
