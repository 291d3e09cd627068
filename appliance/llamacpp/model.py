"""One GGUF model in llama.cpp: its vocabulary, its KV memory and one batch buffer, over the low-level API.

Everything but the vocabulary (`tokenize`, `piece`, `end_tokens`) may be touched by one thread at a time only. Memory is
unified: every sequence draws its cells from one budget of `context_tokens`, and `memory_copy` shares cells instead of
copying them.
"""

import ctypes
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import llama_cpp.llama_cpp as lib
import numpy as np
import numpy.typing as npt

from appliance.errors import EngineFailed, ModelFileError

Rows = npt.NDArray[np.float32]
"""Shape (outputs, vocabulary): views into llama.cpp's own buffer, valid until the next decode."""

NO_KV_ROOM: Final = 1
ABORTED: Final = 2

_GGUF_MAGIC: Final = b"GGUF"
_WARN, _ERROR = 3, 4  # ggml_log_level
_F16_BYTES: Final = 2
_LAST_WORDS: Final = 6
_LOGITS_BYTES: Final = 32 << 20
"""Bound of the logits buffer and of its double in the compute graph; rows beyond what one step reads are waste."""
_SPARE_SEQUENCES: Final = 160
"""Ids for cached prefixes and label forks beside the running sequences. llama.cpp's limit is 256 in all, and its
bookkeeping per step grows with the square of the number."""


class _Log:
    """llama.cpp's log: kept, never printed. Its last words go into the error when something fails."""

    def __init__(self) -> None:
        self._lines: deque[tuple[int, str]] = deque(maxlen=200)
        self._callback = lib.llama_log_callback(self._take)  # kept alive: C holds only the pointer

    def listen(self) -> None:
        self._lines.clear()
        lib.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _take(self, level: int, text: bytes, _data: object) -> None:
        line = text.decode("utf-8", "replace").strip()
        if line and line != ".":
            self._lines.append((level, line))

    def last_words(self) -> str:
        """The last errors, or, where there were none, the last lines of any level."""
        grave = [line for level, line in self._lines if level in (_WARN, _ERROR)]
        lines = grave or [line for _, line in self._lines]
        return " | ".join(lines[-_LAST_WORDS:]) or "llama.cpp gave no reason"


_LOG: Final = _Log()


class Batch:
    """The input of one decode: a preallocated llama_batch whose arrays are numpy's, filled by slices.

    Tokens that belong to several sequences at once point into `fork_ids`, where the ids of one group lie side by side.
    """

    def __init__(self, capacity_tokens: int, outputs_max: int, sequence_ids: int) -> None:
        self.capacity_tokens, self.outputs_max = capacity_tokens, outputs_max
        self.size = self.outputs = 0
        self._tokens = np.zeros(capacity_tokens, np.int32)
        self._positions = np.zeros(capacity_tokens, np.int32)
        self._set_sizes = np.ones(capacity_tokens, np.int32)
        self._set_addresses = np.zeros(capacity_tokens + 1, np.uint64)
        self._wanted = np.zeros(capacity_tokens, np.int8)
        self._own_ids = np.arange(sequence_ids, dtype=np.int32)
        self._own_address = self._own_ids.ctypes.data
        self.raw = lib.llama_batch()
        for name, array in (
            ("token", self._tokens),
            ("pos", self._positions),
            ("n_seq_id", self._set_sizes),
            ("seq_id", self._set_addresses),
            ("logits", self._wanted),
        ):
            setattr(self.raw, name, ctypes.cast(array.ctypes.data, dict(lib.llama_batch._fields_)[name]))

    @property
    def room_tokens(self) -> int:
        return self.capacity_tokens - self.size

    @property
    def room_outputs(self) -> int:
        return self.outputs_max - self.outputs

    def clear(self) -> None:
        self.size = self.outputs = 0

    def add(self, tokens: npt.ArrayLike, position: int, sequence: int, *, last_output: bool) -> int:
        """Append a run of one sequence, first token at `position`; give the row of its last token (-1: no output)."""
        start, stop = self.size, self.size + len(tokens)  # type: ignore[arg-type]
        self._tokens[start:stop] = tokens
        self._positions[start:stop] = np.arange(position, position + stop - start, dtype=np.int32)
        self._set_sizes[start:stop] = 1
        self._set_addresses[start:stop] = self._own_address + 4 * sequence
        self._wanted[start:stop] = 0
        self.size = stop
        if not last_output:
            return -1
        self._wanted[stop - 1] = 1
        self.outputs += 1
        return self.outputs - 1

    def add_each(self, tokens: list[int], positions: list[int], sequences: list[int]) -> int:
        """Append one token for each sequence, every one with an output; give the row of the first."""
        start, stop = self.size, self.size + len(tokens)
        self._tokens[start:stop] = tokens
        self._positions[start:stop] = positions
        self._set_sizes[start:stop] = 1
        addresses = self._set_addresses[start:stop]
        addresses[:] = sequences
        addresses *= np.uint64(4)
        addresses += np.uint64(self._own_address)
        self._wanted[start:stop] = 1
        first, self.size, self.outputs = self.outputs, stop, self.outputs + len(tokens)
        return first

    def add_forks(
        self,
        tokens: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        set_starts: npt.NDArray[np.int32],
        set_sizes: npt.NDArray[np.int32],
        wanted: npt.NDArray[np.int8],
        fork_ids: npt.NDArray[np.int32],
    ) -> int:
        """Append tokens of which number i belongs to `fork_ids[set_starts[i]:][:set_sizes[i]]`; give the first row.

        `fork_ids` must stay alive and unchanged until the batch is decoded.
        """
        start, stop = self.size, self.size + len(tokens)
        self._tokens[start:stop] = tokens
        self._positions[start:stop] = positions
        self._set_sizes[start:stop] = set_sizes
        self._set_addresses[start:stop] = set_starts.astype(np.uint64) * np.uint64(4) + np.uint64(fork_ids.ctypes.data)
        self._wanted[start:stop] = wanted
        first, self.size, self.outputs = self.outputs, stop, self.outputs + int(np.count_nonzero(wanted))
        return first


class Model:
    """A loaded model with one context. Made by `Model.load`, given back by `close`."""

    def __init__(self, path: Path, handle: Any, context: Any, *, threads: int, sequences: int, batch: Batch) -> None:
        self.path, self.threads, self.sequences, self.batch = path, threads, sequences, batch
        self._handle, self._context = handle, context
        self._memory = lib.llama_get_memory(context)
        self.vocab_pointer = lib.llama_model_get_vocab(handle)
        self.metadata = _metadata(handle)
        self.architecture = self.metadata.get("general.architecture", "unknown")
        self.name = self.metadata.get("general.name", path.stem)
        self.description = _string(lambda buffer, size: lib.llama_model_desc(handle, buffer, size))
        self.vocabulary_size: int = lib.llama_vocab_n_tokens(self.vocab_pointer)
        self.context_tokens: int = lib.llama_n_ctx(context)
        self.train_context_tokens: int = lib.llama_model_n_ctx_train(handle)
        self.size_bytes: int = lib.llama_model_size(handle)
        self.n_params: int = lib.llama_model_n_params(handle)
        self.bos_token: int = lib.llama_vocab_bos(self.vocab_pointer)
        self.eos_token: int = lib.llama_vocab_eos(self.vocab_pointer)
        self.end_tokens = frozenset(
            token for token in range(self.vocabulary_size) if lib.llama_vocab_is_eog(self.vocab_pointer, token)
        )
        self.forkable = _forkable(handle)
        self._pieces: list[bytes | None] = [None] * self.vocabulary_size
        self._rows: Rows = np.empty((0, self.vocabulary_size), np.float32)
        self._rows_address = 0
        # llama.cpp asks this function between graph nodes whether to give up. A Python callback there would take the
        # interpreter lock about a thousand times a step; strlen answers 0 while the flag is the empty string, else 1.
        self._abort_flag = ctypes.create_string_buffer(2)
        self._abort_callback = ctypes.cast(ctypes.CDLL(None).strlen, lib.ggml_abort_callback)
        lib.llama_set_abort_callback(context, self._abort_callback, ctypes.addressof(self._abort_flag))

    @property
    def sequence_ids(self) -> int:
        """How many sequence ids may be in use at once, caches and forks included."""
        return int(lib.llama_n_seq_max(self._context))

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
        attention: Literal["fast", "exact"] = "fast",
    ) -> "Model":
        """Load `path` with one KV budget of `context_tokens` (rounded up to 256) for up to `sequences` at once.

        "exact" attention is for comparisons: it computes and stores in float32, so that neither the rest of the batch
        nor the place of a cell changes a log probability by more than 1e-4. The fast one (flash attention in float16)
        is up to twice as quick when much is cached and lets them differ by about a hundredth.

        Raises ModelFileError when the file is missing, truncated, corrupt or no language model; EngineFailed when
        the file is good and the context does not fit into memory.
        """
        _check_file(path)
        _LOG.listen()
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        handle = lib.llama_model_load_from_file(str(path).encode(), params)
        if not handle:
            raise ModelFileError(
                f"{str(path)!r} cannot be loaded, it is truncated, corrupt or of an unknown kind: pull it again. "
                f"llama.cpp says: {_LOG.last_words()}"
            )
        if not lib.llama_model_has_decoder(handle) or lib.llama_model_has_encoder(handle):
            lib.llama_model_free(handle)
            raise ModelFileError(f"{str(path)!r} is not a decoder-only language model: choose one that generates text")
        try:
            _check_memory(handle, context_tokens)
        except EngineFailed:
            lib.llama_model_free(handle)
            raise
        ids = min(256, sequences + _SPARE_SEQUENCES) if _forkable(handle) else sequences + 1
        vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(handle))
        outputs = max(ids, min(batch_tokens, _LOGITS_BYTES // (4 * vocabulary)))
        context = lib.llama_init_from_model(
            handle, _context_params(context_tokens, max(batch_tokens, outputs), ids, outputs, threads, attention)
        )
        if not context:
            lib.llama_model_free(handle)
            raise EngineFailed(
                f"a context of {context_tokens} tokens for {path.name!r} cannot be made: ask for fewer tokens. "
                f"llama.cpp says: {_LOG.last_words()}"
            )
        batch = Batch(lib.llama_n_batch(context), outputs, ids)
        return cls(path, handle, context, threads=threads, sequences=sequences, batch=batch)

    def close(self) -> None:
        """Give the memory back. The model must not be used afterwards; closing twice is harmless."""
        if self._context:
            self._rows = np.empty((0, self.vocabulary_size), np.float32)
            lib.llama_free(self._context)
            lib.llama_model_free(self._handle)
            self._context = self._handle = self._memory = None

    def use_threads(self, threads: int) -> None:
        """Compute with so many threads from the next decode on."""
        lib.llama_set_n_threads(self._context, threads, threads)
        self.threads = threads

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

    # Computing: the engine's thread only.

    def decode(self) -> int:
        """Run `batch`. 0: done, `rows` are valid. NO_KV_ROOM: nothing changed. ABORTED or below 0: memory in doubt."""
        self.batch.raw.n_tokens = self.batch.size
        self._rows_address = 0
        return int(lib.llama_decode(self._context, self.batch.raw))

    @property
    def rows(self) -> Rows:
        """Logits of the tokens of the last decode that asked for output, in the order they were added."""
        pointer = ctypes.cast(lib.llama_get_logits(self._context), ctypes.c_void_p).value
        if not pointer or not self.batch.outputs:
            return self._rows[:0]
        shape = (self.batch.outputs, self.vocabulary_size)
        if pointer != self._rows_address:
            raw = (ctypes.c_float * (shape[0] * shape[1])).from_address(pointer)
            self._rows, self._rows_address = np.ctypeslib.as_array(raw).reshape(shape), pointer
        return self._rows

    def abort(self) -> None:
        """Make a decode that runs in another thread give up within milliseconds; it returns ABORTED."""
        self._abort_flag.raw = b"\x01\x00"

    def reset(self) -> None:
        """Forget everything, an `abort` included."""
        self._abort_flag.raw = b"\x00\x00"
        self.memory_clear()

    def last_words(self) -> str:
        """What llama.cpp last complained about."""
        return _LOG.last_words()

    def memory_copy(self, source: int, target: int, start: int, stop: int) -> None:
        """Let sequence `target` share the cells of `source` at positions [start, stop)."""
        lib.llama_memory_seq_cp(self._memory, source, target, start, stop)

    def memory_remove(self, sequence: int, start: int, stop: int = -1) -> None:
        """Take sequence `sequence` off its cells at positions [start, stop); cells nobody holds become free."""
        lib.llama_memory_seq_rm(self._memory, sequence, start, stop)

    def memory_clear(self) -> None:
        """Forget everything."""
        lib.llama_memory_clear(self._memory, False)

    def memory_length(self, sequence: int) -> int:
        """Positions held by a sequence, counted from 0."""
        return int(lib.llama_memory_seq_pos_max(self._memory, sequence)) + 1


def _context_params(
    context_tokens: int, batch_tokens: int, ids: int, outputs: int, threads: int, attention: Literal["fast", "exact"]
) -> Any:
    params = lib.llama_context_default_params()
    params.n_ctx = context_tokens
    params.n_batch = params.n_ubatch = batch_tokens
    params.n_seq_max = ids
    params.n_outputs_max = outputs
    params.n_threads = params.n_threads_batch = threads
    if attention == "exact":
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.type_k = params.type_v = lib.GGML_TYPE_F32
    params.kv_unified = True
    # A sliding-window model keeps its whole cache, so that sequences of it can be forked and shortened like others.
    params.swa_full = True
    params.no_perf = True
    return params


def _check_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise ModelFileError(f"{str(path)!r} does not exist: pull the model or correct the path") from None
    except OSError as error:
        raise ModelFileError(f"{str(path)!r} cannot be read ({error.strerror}): correct path or permissions") from error
    if magic != _GGUF_MAGIC:
        raise ModelFileError(f"{str(path)!r} is not a GGUF file (it begins with {magic!r}): pull the model again")


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


def _forkable(handle: Any) -> bool:
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
