"""The input of one llama_decode: arrays that are allocated once and filled by slices."""

import ctypes

import numpy as np
import numpy.typing as npt

from appliance.llamacpp.binding import lib


class DecodeBatch:
    """A preallocated llama_batch whose arrays are numpy's.

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
    def tokens(self) -> npt.NDArray[np.int32]:
        return self._tokens[: self.size]

    @property
    def free_tokens(self) -> int:
        return self.capacity_tokens - self.size

    @property
    def free_outputs(self) -> int:
        return self.outputs_max - self.outputs

    def clear(self) -> None:
        self.size = self.outputs = 0

    def add(
        self, tokens: npt.ArrayLike, position: int, sequence: int, *, last_output: bool, before_last: int = 0
    ) -> int:
        """Append a run of one sequence, first token at `position`; give the row of its last token (-1: no output).

        So many tokens `before_last` have rows too.
        """
        start, stop = self.size, self.size + len(tokens)  # type: ignore[arg-type]
        self._tokens[start:stop] = tokens
        self._positions[start:stop] = np.arange(position, position + stop - start, dtype=np.int32)
        self._set_sizes[start:stop] = 1
        self._set_addresses[start:stop] = self._own_address + 4 * sequence
        self._wanted[start:stop] = 0
        self.size = stop
        if not last_output:
            return -1
        self._wanted[stop - 1 - before_last : stop] = 1
        self.outputs += 1 + before_last
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
