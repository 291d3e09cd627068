"""One context of llama.cpp: KV memory and one batch, computed with the weights of a model that others may share.

One thread at a time, but for `abort`.
"""

import ctypes
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from appliance.llamacpp.batch import DecodeBatch
from appliance.llamacpp.binding import lib
from appliance.llamacpp.memory_release import release_pages

Rows = npt.NDArray[np.float32]
"""Shape (outputs, vocabulary): views into llama.cpp's own buffer, valid until the next decode."""
Attention = Literal["fast", "exact"]

_PASS_TOKENS: Final = 256
"""llama.cpp computes a longer batch in passes of so many tokens. Activations of 256 stay in the processor's cache:
SmolLM2-135M reads 512 tokens in 0.94 (BF16), 0.98 (Q4_0), 0.97 (Q8_0 with the kernels) and 1.03 times (Q8_0 without)
the time of one pass, with 7 MB less."""
NO_KV_ROOM: Final = 1
ABORTED: Final = 2


class LlamaContext:
    """KV memory by sequence id, and a batch to compute into it. `close` gives the memory back."""

    def __init__(self, context: Any, batch: DecodeBatch, vocabulary_size: int) -> None:
        self.batch, self.vocabulary_size = batch, vocabulary_size
        self._context = context
        self._memory = lib.llama_get_memory(context)
        self._rows: Rows = np.empty((0, vocabulary_size), np.float32)
        self._rows_address = 0
        # llama.cpp asks this function between graph nodes whether to give up. A Python callback there would take the
        # interpreter lock about a thousand times a step; strlen answers 0 while the flag is the empty string, else 1.
        self._abort_flag = ctypes.create_string_buffer(2)
        self._abort_callback = ctypes.cast(ctypes.CDLL(None).strlen, lib.ggml_abort_callback)
        lib.llama_set_abort_callback(context, self._abort_callback, ctypes.addressof(self._abort_flag))

    def close(self) -> None:
        """The context must not be used afterwards; closing twice is harmless."""
        if self._context:
            self._rows = np.empty((0, self.vocabulary_size), np.float32)
            lib.llama_free(self._context)
            self._context = self._memory = None

    def decode(self) -> int:
        """Run `batch`. 0: done, `rows` are valid. NO_KV_ROOM: nothing changed. ABORTED or below 0: memory in doubt."""
        self.batch.raw.n_tokens = self.batch.size
        return int(lib.llama_decode(self._context, self.batch.raw))

    @property
    def rows(self) -> Rows:
        """Logits of the tokens of the last decode that asked for output, in the order they were added."""
        pointer = lib.llama_get_logits(self._context)
        if not pointer or not self.batch.outputs:
            return self._rows[:0]
        address = ctypes.addressof(pointer.contents)  # a cast would leave a cycle of references behind each time
        if address != self._rows_address:
            shape = (self.batch.outputs_max, self.vocabulary_size)
            raw = (ctypes.c_float * (shape[0] * shape[1])).from_address(address)
            self._rows, self._rows_address = np.ctypeslib.as_array(raw).reshape(shape), address
        return self._rows[: self.batch.outputs]

    def release_unread_rows(self) -> None:
        """llama.cpp writes zeros into a row of logits for every sequence id; give back those `batch` never reads."""
        address = lib.llama_get_logits(self._context)
        if address:
            row_bytes = 4 * self.vocabulary_size
            ids = int(lib.llama_n_seq_max(self._context))
            first = ctypes.addressof(address.contents) + self.batch.outputs_max * row_bytes
            release_pages(first, (ids - self.batch.outputs_max) * row_bytes)

    def abort(self) -> None:
        """Make a decode that runs in another thread give up within milliseconds; it returns ABORTED, and so does
        every later one until `allow`."""
        self._abort_flag.raw = b"\x01\x00"

    def clear_abort(self) -> None:
        """Take an `abort` back."""
        self._abort_flag.raw = b"\x00\x00"

    def reset(self) -> None:
        """Forget everything, an `abort` included."""
        self.clear_abort()
        self.memory_clear()

    def memory_copy(self, source: int, target: int, start: int, stop: int) -> None:
        """Let sequence `target` share the cells of `source` at positions [start, stop)."""
        lib.llama_memory_seq_cp(self._memory, source, target, start, stop)

    def memory_remove(self, sequence: int, start: int, stop: int = -1) -> None:
        """Take sequence `sequence` off its cells at positions [start, stop); cells that nothing holds become free."""
        lib.llama_memory_seq_rm(self._memory, sequence, start, stop)

    def memory_clear(self) -> None:
        """Forget everything."""
        lib.llama_memory_clear(self._memory, False)

    def memory_length(self, sequence: int) -> int:
        """Positions held by a sequence, counted from 0."""
        return int(lib.llama_memory_seq_pos_max(self._memory, sequence)) + 1

    def save_sequence(self, sequence: int, spare_bytes: int = 0) -> npt.NDArray[np.uint8]:
        """A sequence's keys and values in llama.cpp's own form, followed by `spare_bytes` of zeros."""
        size = lib.llama_state_seq_get_size(self._context, sequence)
        saved = np.empty(size + spare_bytes, np.uint8)
        saved[size:] = 0
        target = saved.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        lib.llama_state_seq_get_data(self._context, target, size, sequence)
        return saved

    def restore_sequence(self, sequence: int, saved: npt.NDArray[np.uint8]) -> bool:
        """Put what was saved into an empty sequence. False: it does not fit; the sequence stays empty."""
        source = saved.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        return bool(lib.llama_state_seq_set_data(self._context, source, len(saved), sequence))

    def set_threads(self, threads: int) -> None:
        """Compute with so many threads from the next decode on."""
        lib.llama_set_n_threads(self._context, threads, threads)


def make_context_params(
    *, cells: int, batch_tokens: int, ids: int, outputs: int, threads: int, attention: Attention
) -> Any:
    """Parameters for one KV memory of `cells` that all sequences share."""
    params = lib.llama_context_default_params()
    params.n_ctx = cells
    params.n_batch, params.n_ubatch = batch_tokens, min(batch_tokens, _PASS_TOKENS)
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
