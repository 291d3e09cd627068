"""One GGUF model in llama.cpp: its vocabulary, its KV memory and one batch buffer, over the low-level API.

Everything but the vocabulary (`tokenize`, `piece`, `end_tokens`) may be touched by one thread at a time only. Memory is
unified: every sequence draws its cells from one budget, and `memory_copy` shares cells instead of copying them. Where
the budget has room to spare, a part of it becomes `slots`.
"""

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from appliance.errors import EngineFailed
from appliance.llamacpp.batch import DecodeBatch
from appliance.llamacpp.binding import lib
from appliance.llamacpp.context import Attention, LlamaContext, make_context_params
from appliance.llamacpp.kv.per_sequence import PerSequenceKv, choose_slot_tokens
from appliance.llamacpp.memory_release import release_file_pages
from appliance.llamacpp.weights import LOG, check_gguf_file, load_weights

_F16_BYTES: Final = 2
_SPARE_ROWS: Final = 32
"""Rows of logits that a step may read beside one for each running sequence. A row is held twice, as result and in the
compute graph: 0.4 MB at 49,152 tokens. With 64 rows in all 77 labels take 1.07 times the CPU of 144 rows, 8 labels the
same."""
_SPARE_SEQUENCES: Final = 112
"""Ids for cached prefixes and label forks beside the running sequences. llama.cpp's limit is 256 in all, and its work
per step grows with the square of the number."""


class LlamaModel(LlamaContext):
    """A loaded model with the context that all sequences share. Made by `LlamaModel.load`, given back by `close`."""

    def __init__(
        self, path: Path, handle: Any, context: Any, *, threads: int, sequences: int, batch: DecodeBatch
    ) -> None:
        self.path, self.threads, self.sequences = path, threads, sequences
        self._handle, self._abandoned = handle, False
        self.vocab_pointer = lib.llama_model_get_vocab(handle)
        super().__init__(context, batch, lib.llama_vocab_n_tokens(self.vocab_pointer))
        self.slots: PerSequenceKv | None = None
        self.metadata = _metadata(handle)
        self.architecture = self.metadata.get("general.architecture", "unknown")
        self.name = self.metadata.get("general.name", path.stem)
        self.description = _string(lambda buffer, size: lib.llama_model_desc(handle, buffer, size))
        self.context_tokens: int = lib.llama_n_ctx(context)
        self.train_context_tokens: int = lib.llama_model_n_ctx_train(handle)
        self.size_bytes: int = lib.llama_model_size(handle)
        self.n_params: int = lib.llama_model_n_params(handle)
        self.bos_token: int = lib.llama_vocab_bos(self.vocab_pointer)
        self.eos_token: int = lib.llama_vocab_eos(self.vocab_pointer)
        self.end_tokens = frozenset(
            token for token in range(self.vocabulary_size) if lib.llama_vocab_is_eog(self.vocab_pointer, token)
        )
        self.forkable = _is_forkable(handle)
        self._pieces: list[bytes | None] = [None] * self.vocabulary_size

    @property
    def sequence_ids(self) -> int:
        """How many sequence ids may be in use at once, caches and forks included."""
        return int(lib.llama_n_seq_max(self._context))

    @property
    def kv_capacity_tokens(self) -> int:
        """KV cells in all: the shared ones and those of the slots."""
        return self.context_tokens + (self.slots.count * self.slots.tokens if self.slots is not None else 0)

    @property
    def sequence_context_tokens(self) -> int:
        """The longest one sequence may become: beyond the trained context a model only rambles."""
        return min(self.context_tokens, self.train_context_tokens or self.context_tokens)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        threads: int,
        context_tokens: int,
        sequences: int,
        batch_tokens: int = 512,
        attention: Attention = "fast",
        slot_tokens: int | None = None,
        mapped: bool = True,
    ) -> "LlamaModel":
        """Load `path` with a KV budget of `context_tokens` (rounded up to 256) for up to `sequences` at once.

        "exact" attention is for comparisons: it computes and stores in float32, so that neither the rest of the batch
        nor the place of a cell changes a log probability by more than 1e-4. The fast one (flash attention in float16)
        is up to twice as quick when much is cached and lets them differ by about a hundredth.

        `slot_tokens`: cells of each sequence's slot, taken out of the budget; 0: none. Left out, slots get what the
        budget has beyond one sequence of the trained length, if that makes useful slots.

        `mapped`: the weights stay in the mapped file. Not where they are packed while they load
        (`has_packed_weights`): both copies would be in memory for a while.

        Raises ModelFileError when the file is missing, truncated, corrupt or no language model; EngineFailed when
        the file is good and the context does not fit into memory.
        """
        check_gguf_file(path)
        LOG.listen()
        handle = load_weights(path, mapped=mapped)
        try:
            _check_memory(handle, context_tokens)
            if slot_tokens is None:
                slot_tokens = _choose_slot_tokens(handle, context_tokens, sequences)
            ids = min(256, sequences + _SPARE_SEQUENCES) if _is_forkable(handle) else sequences + 1
            rows = sequences + _SPARE_ROWS
            params = make_context_params(
                cells=context_tokens - slot_tokens * sequences,
                batch_tokens=max(batch_tokens, rows, ids),
                ids=ids,
                outputs=max(rows, ids),
                threads=threads,
                attention=attention,
            )
            context = _make_context(path, handle, params, context_tokens)
        except EngineFailed:
            lib.llama_model_free(handle)
            raise
        batch = DecodeBatch(lib.llama_n_batch(context), rows, ids)
        model = cls(path, handle, context, threads=threads, sequences=sequences, batch=batch)
        model.release_unread_rows()
        # All of the file is in memory now, and most of it twice where kernels keep weights in an order of their own.
        release_file_pages(path)
        if slot_tokens:
            model.slots = PerSequenceKv.make(
                handle, model, count=sequences, tokens=slot_tokens, threads=threads, attention=attention
            )
        return model

    def close(self) -> None:
        """Give the memory back. The model must not be used afterwards; closing twice is harmless."""
        if self._handle and not self._abandoned:
            if self.slots is not None:
                self.slots.close()
            super().close()
            lib.llama_model_free(self._handle)
            self._handle = None

    def abandon(self) -> None:
        """A thread that cannot be stopped may still compute: `close` frees nothing from now on, as freed memory under
        its feet would end the whole process without a word."""
        self._abandoned = True

    def set_threads(self, threads: int) -> None:
        """Compute with so many threads from the next decode on."""
        super().set_threads(threads)
        if self.slots is not None:
            self.slots.set_threads(threads)
        self.threads = threads

    def abort(self) -> None:
        """Make a decode that runs in another thread give up within milliseconds, in the slots as well."""
        super().abort()
        if self.slots is not None:
            self.slots.abort()

    def clear_abort(self) -> None:
        """Take an `abort` back."""
        super().clear_abort()
        if self.slots is not None:
            self.slots.clear_abort()

    def memory_clear(self) -> None:
        """Forget everything, in the slots as well."""
        super().memory_clear()
        if self.slots is not None:
            self.slots.memory_clear()

    def last_log_lines(self) -> str:
        """What llama.cpp last warned of or failed with."""
        return LOG.last_lines()

    # The vocabulary: safe from any thread.

    def tokenize(self, text: str, *, special: bool = True, bos: bool = False) -> list[int]:
        """Token ids of `text`; `special`: "<|im_end|>" becomes one token; `bos`: add BOS/EOS if the model wants them.

        Lone surrogates become U+FFFD, NUL is a character like any other.
        """
        data = text.encode("utf-8", "replace") if text.isascii() else _encode(text)
        room = len(data) + 4
        buffer = (lib.llama_token * room)()
        count = lib.llama_tokenize(self.vocab_pointer, data, len(data), buffer, room, bos, special)
        if count < 0:
            buffer = (lib.llama_token * -count)()
            count = lib.llama_tokenize(self.vocab_pointer, data, len(data), buffer, -count, bos, special)
        return list(buffer[:count])

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token, perhaps a part of a character. Special tokens are empty unless asked for."""
        if special:
            return self._render(token, special=True)
        known = self._pieces[token]
        if known is None:
            known = self._pieces[token] = self._render(token, special=False)
        return known

    def _render(self, token: int, *, special: bool) -> bytes:
        buffer = ctypes.create_string_buffer(64)
        count = lib.llama_token_to_piece(self.vocab_pointer, token, buffer, 64, 0, special)
        if count < 0:
            buffer = ctypes.create_string_buffer(-count)
            count = lib.llama_token_to_piece(self.vocab_pointer, token, buffer, -count, 0, special)
        return buffer.raw[:count]


def _choose_slot_tokens(handle: Any, context_tokens: int, sequences: int) -> int:
    if not _is_forkable(handle):
        return 0
    return choose_slot_tokens(context_tokens, lib.llama_model_n_ctx_train(handle), sequences)


def _make_context(path: Path, handle: Any, params: Any, context_tokens: int) -> Any:
    context = lib.llama_init_from_model(handle, params)
    if not context:
        raise EngineFailed(
            f"a context of {context_tokens} tokens for {path.name!r} cannot be made: ask for fewer tokens. "
            f"llama.cpp says: {LOG.last_lines()}"
        )
    return context


def _check_memory(handle: Any, context_tokens: int) -> None:
    """Refuse what no memory of this machine could hold: llama.cpp would be killed while it fills it with zeros."""
    head_size = lib.llama_model_n_embd(handle) // max(1, lib.llama_model_n_head(handle))
    row_bytes = 2 * _F16_BYTES * head_size * lib.llama_model_n_head_kv(handle)
    needed = context_tokens * row_bytes * lib.llama_model_n_layer(handle)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if context_tokens < 1 or needed > memory:
        raise EngineFailed(
            f"a context of {context_tokens} tokens takes about {needed} bytes and this machine has {memory}: "
            "ask for fewer tokens, and for at least 1"
        )


def _is_forkable(handle: Any) -> bool:
    """Whether a sequence's memory may be shared up to any position and cut there: not where it is one running state."""
    return not (lib.llama_model_is_recurrent(handle) or lib.llama_model_is_hybrid(handle))


def _metadata(handle: Any) -> Mapping[str, str]:
    count = lib.llama_model_meta_count(handle)
    keys = [_string(lambda b, n, i=i: lib.llama_model_meta_key_by_index(handle, i, b, n)) for i in range(count)]
    values = [_string(lambda b, n, i=i: lib.llama_model_meta_val_str_by_index(handle, i, b, n)) for i in range(count)]
    return MappingProxyType(dict(zip(keys, values, strict=True)))


def _string(read: Any) -> str:
    """Call one of llama.cpp's string readers, again with a larger buffer where the first was too small."""
    size = 1024
    while True:
        buffer = ctypes.create_string_buffer(size)
        length = read(buffer, size)
        if length < size:
            return buffer.raw[: max(length, 0)].decode("utf-8", "replace")
        size = length + 1


def _encode(text: str) -> bytes:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")
