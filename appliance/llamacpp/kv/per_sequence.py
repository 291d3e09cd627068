"""Slots: KV memory in which every generating sequence has cells of its own, next to the memory that all share.

With llama.cpp's own attention each token of the shared memory looks at the mask of every cell in use
(the native kernels look at a sequence's own cells alone, and then there are no slots). With 32 sequences of 160 tokens
that makes a decode step of SmolLM2-135M 1.6 times as long as one in which each looks at its own cells only. Prompts,
prefixes and labels stay in the shared memory, where they can be forked without copying; a sequence moves to a slot
once its prompt is computed, and back when it outgrows the slot or to be cached. A move copies its keys and values, in
about a quarter of a millisecond.
"""

from typing import Any, Final

import numpy as np

from appliance.llamacpp.batch import DecodeBatch
from appliance.llamacpp.binding import lib
from appliance.llamacpp.context import Attention, LlamaContext, make_context_params

_ROUNDING_TOKENS: Final = 256
_LEAST_SLOT_TOKENS: Final = 512
"""Shorter slots would be outgrown by everyday answers."""
_MOST_SLOT_TOKENS: Final = 2048
_WORD_BYTES: Final = 4
_HEADER_WORDS: Final = 3
"""A saved sequence begins with a magic number, its id and the number of streams; then comes, for every stream, the
number of its cells and, where that is not 0, what they hold."""


def choose_slot_tokens(cells: int, trained_tokens: int, sequences: int) -> int:
    """How long each of `sequences` slots may be within `cells` in all, or 0 for no slots.

    The shared memory keeps at least room for one sequence as long as the model was trained for, so that slots shorten
    no context, and at least half.
    """
    spare = min(cells // 2, cells - trained_tokens)
    each = min(spare // max(1, sequences), _MOST_SLOT_TOKENS) // _ROUNDING_TOKENS * _ROUNDING_TOKENS
    return each if sequences > 1 and each >= _LEAST_SLOT_TOKENS else 0


class PerSequenceKv(LlamaContext):
    """`count` slots of `tokens` cells each; a slot is one sequence id of this context. Slots in use lie side by side
    from 0 on, as llama.cpp computes only neighbours together."""

    def __init__(self, context: Any, main: LlamaContext, count: int, vocabulary_size: int) -> None:
        super().__init__(context, DecodeBatch(count, count, count), vocabulary_size)
        self._main = main
        self.count = count
        self.tokens = int(lib.llama_n_ctx_seq(context))

    @classmethod
    def make(
        cls, handle: Any, main: LlamaContext, *, count: int, tokens: int, threads: int, attention: Attention
    ) -> "PerSequenceKv | None":
        """Slots beside `main` for the same weights; None where this llama.cpp or this kind of memory cannot move a
        sequence between the two."""
        params = make_context_params(
            cells=count * tokens, batch_tokens=count, ids=count, outputs=count, threads=threads, attention=attention
        )
        params.kv_unified = False
        context = lib.llama_init_from_model(handle, params)
        if not context:
            return None
        slots = cls(context, main, count, main.vocabulary_size)
        if slots._moves():
            return slots
        slots.close()
        return None

    def copy_in(self, sequence: int, slot: int) -> bool:
        """Copy a sequence of the shared memory into an empty slot. False: it does not fit; the slot stays empty."""
        # One stream of the shared memory becomes one of many: those of the other slots have no cells.
        saved = self._main.save_sequence(sequence, (self.count - 1) * _WORD_BYTES)
        saved.view(np.uint32)[_HEADER_WORDS - 1] = self.count
        return self.restore_sequence(slot, saved)

    def move_out(self, slot: int, sequence: int, start: int = 0) -> bool:
        """Move what a slot holds from position `start` on into an unused sequence of the shared memory, and empty the
        slot. False: no room there; the sequence stays unused."""
        if start:
            self.memory_remove(slot, 0, start)
        saved = self.save_sequence(slot)
        self.memory_remove(slot, 0)
        # The shared memory is one stream: cut off what says that the other slots' streams are empty.
        own = saved[slot * _WORD_BYTES : len(saved) - (self.count - slot - 1) * _WORD_BYTES]
        header = own[: _HEADER_WORDS * _WORD_BYTES].view(np.uint32)
        header[:] = saved[:_WORD_BYTES].view(np.uint32)[0], sequence, 1
        return self._main.restore_sequence(sequence, own)

    def move_slot(self, source: int, target: int) -> bool:
        """Move a slot's content into another, empty one."""
        saved = self.save_sequence(source)
        self.memory_remove(source, 0)
        return self.restore_sequence(target, saved)

    def _moves(self) -> bool:
        """Try it: one token there and back. The form of a saved sequence is llama.cpp's own and may change."""
        main, batch = self._main, self._main.batch
        batch.clear()
        batch.add([0], 0, 0, last_output=True)
        worked = main.decode() == 0 and self.copy_in(0, self.count - 1) and self.memory_length(self.count - 1) == 1
        worked = worked and self.move_slot(self.count - 1, 0) and self.move_out(0, 1) and main.memory_length(1) == 1
        main.memory_clear()
        self.memory_clear()
        batch.clear()
        return worked
