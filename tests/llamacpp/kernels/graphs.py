"""Single operations of ggml through its C interface, run in a process of their own.

What a library adds to ggml holds for the whole process, so the tests hand arrays to one process with the kernels and
to one without. Shapes are numpy's: the last axis is ggml's first.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import llama_cpp
import numpy as np
import numpy.typing as npt

from appliance.llamacpp.kernels import PLAIN_KERNELS, Kernels, install_kernels

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]

BUFFER_TYPE: Final = b"CPU_PACKED"
F32, F16, Q4_0, Q4_1, Q8_0, I32 = 0, 1, 2, 3, 8, 26
BLOCKS: Final = {
    Q4_0: np.dtype([("scale", "<f2"), ("weights", "u1", 16)]),
    Q4_1: np.dtype([("scale", "<f2"), ("least", "<f2"), ("weights", "u1", 16)]),
    Q8_0: np.dtype([("scale", "<f2"), ("weights", "i1", 32)]),
}
"""Blocks of 32 weights, as they lie in a file."""
_TYPES: Final = {np.dtype(np.float32): F32, np.dtype(np.float16): F16, np.dtype(np.int32): I32} | {
    form: kind for kind, form in BLOCKS.items()
}
_CPU: Final = 0
_CONTEXT_BYTES: Final = 1 << 20
_BUFFER_OFFSET: Final = 8
"""Of the pointer to its buffer in a ggml_tensor."""

_LIBRARIES: Final = [ctypes.CDLL(f"libggml{part}.so.0") for part in ("-base", "-cpu", "")]
"""Those that llama.cpp has loaded: by a path it would be the wheel's other copy of the same library."""
_state: dict[str, Kernels] = {}


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def begin(plain: bool) -> None:
    """Once in each process, before anything is computed."""
    llama_cpp.llama_backend_init()
    _state["kernels"] = PLAIN_KERNELS if plain else install_kernels()


def kernels() -> Kernels:
    return _state["kernels"]


def _function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    function = next(getattr(library, name) for library in _LIBRARIES if hasattr(library, name))
    function.restype, function.argtypes = result, arguments
    return function  # type: ignore[no-any-return]


def _call(name: str, *arguments: Any) -> Any:
    """A function that takes pointers and numbers of 64 bits and returns a pointer."""
    kinds = [ctypes.c_int64 if isinstance(one, int) else type(one) for one in arguments]
    return ctypes.c_void_p(_function(name, ctypes.c_void_p, *kinds)(*arguments))


class Graph:
    """One operation's tensors: leaves get their values with `run`."""

    def __init__(self) -> None:
        params = _InitParams(_CONTEXT_BYTES, None, True)
        self.context = ctypes.c_void_p(_function("ggml_init", ctypes.c_void_p, _InitParams)(params))
        self._weights = ctypes.c_void_p(_function("ggml_init", ctypes.c_void_p, _InitParams)(params))
        self._values: list[tuple[ctypes.c_void_p, npt.NDArray[Any]]] = []

    def close(self) -> None:
        for context in (self.context, self._weights):
            _call("ggml_free", context)

    def leaf(self, values: npt.NDArray[Any]) -> ctypes.c_void_p:
        """A tensor with these values; up to four axes."""
        return self._tensor(self.context, _TYPES[values.dtype], values.shape, values)

    def weights(self, blocks: npt.NDArray[np.void]) -> ctypes.c_void_p:
        """Weights from BLOCKS of one kind, shape (..., outputs, inputs / 32); in the kernels' memory if they run."""
        shape = (*blocks.shape[:-1], blocks.shape[-1] * 32)
        return self._tensor(self._weights, _TYPES[blocks.dtype], shape, blocks)

    def op(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        return ctypes.c_void_p(_call(name, self.context, *arguments).value)

    def run(self, result: ctypes.c_void_p, shape: tuple[int, ...], threads: int) -> Floats:
        """Compute `result`, which has this shape."""
        plain = _call("ggml_backend_cpu_buffer_type")
        buffers = [_call("ggml_backend_alloc_ctx_tensors_from_buft", self._weights, buffer_type() or plain)]
        buffers.append(_call("ggml_backend_alloc_ctx_tensors_from_buft", self.context, plain))
        for tensor, values in self._values:
            data = np.ascontiguousarray(values)
            _call("ggml_backend_tensor_set", tensor, ctypes.c_void_p(data.ctypes.data), 0, data.nbytes)
        graph = self.op("ggml_new_graph")
        _call("ggml_build_forward_expand", graph, result)
        backend = _call("ggml_backend_cpu_init")
        _call("ggml_backend_cpu_set_n_threads", backend, threads)
        status = _function("ggml_backend_graph_compute", ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(backend, graph)
        assert status == 0
        found = np.empty(shape, np.float32)
        _call("ggml_backend_tensor_get", result, ctypes.c_void_p(found.ctypes.data), 0, found.nbytes)
        _call("ggml_backend_free", backend)
        for buffer in buffers:
            if buffer:
                _call("ggml_backend_buffer_free", buffer)
        return found

    def _tensor(
        self, context: ctypes.c_void_p, kind: int, shape: tuple[int, ...], values: npt.NDArray[Any]
    ) -> ctypes.c_void_p:
        create = partial(_call, f"ggml_new_tensor_{len(shape)}d", context, ctypes.c_int(kind))
        tensor = ctypes.c_void_p(create(*reversed(shape)).value)
        self._values.append((tensor, values))
        return tensor


@contextmanager
def graph() -> Iterator[Graph]:
    made = Graph()
    try:
        yield made
    finally:
        made.close()


def buffer_type() -> ctypes.c_void_p | None:
    """The kernels' memory; None where they do not run."""
    device = _call("ggml_backend_dev_by_type", ctypes.c_int(_CPU))
    registry = _call("ggml_backend_dev_backend_reg", device)
    address = _call("ggml_backend_reg_get_proc_address", registry, ctypes.c_char_p(b"ggml_backend_dev_get_extra_bufts"))
    listed = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address.value)(device)
    name = _function("ggml_backend_buft_name", ctypes.c_char_p, ctypes.c_void_p)
    for kind in _until_null(listed):
        if name(kind) == BUFFER_TYPE:
            return ctypes.c_void_p(kind)
    return None


def _until_null(address: int) -> Iterator[int]:
    while (value := ctypes.c_void_p.from_address(address).value) is not None:
        yield value
        address += ctypes.sizeof(ctypes.c_void_p)


def multiply(blocks: npt.NDArray[np.void], inputs: Floats, threads: int, gap: int = 0) -> Floats:
    """Products of weights (outputs, blocks) with inputs (planes, tokens, 32 x blocks): (planes, tokens, outputs).

    With a `gap`, rows of the inputs lie so many values apart.
    """
    planes, tokens, width = inputs.shape
    with graph() as made:
        wide = np.pad(inputs, ((0, 0), (0, 0), (0, gap)), constant_values=np.float32(np.nan))
        rows = made.leaf(wide)
        if gap:
            row = 4 * (width + gap)
            rows = made.op("ggml_view_3d", rows, width, tokens, planes, row, row * tokens, 0)
        product = made.op("ggml_mul_mat", made.weights(blocks), rows)
        return made.run(product, (planes, tokens, blocks.shape[0]), threads)


def pick(blocks: npt.NDArray[np.void], numbers: npt.NDArray[np.int32], threads: int) -> Floats:
    """Rows of weights (outputs, blocks) as floats: (numbers, 32 x blocks)."""
    with graph() as made:
        rows = made.op("ggml_get_rows", made.weights(blocks), made.leaf(numbers))
        return made.run(rows, (len(numbers), 32 * blocks.shape[1]), threads)


def accepts(kind: int, shape: tuple[int, ...]) -> bool:
    """Whether the kernels would take weights of this type and shape for a product, as a model's loader asks."""
    mine = buffer_type()
    assert mine is not None
    with graph() as made:
        create = partial(_call, f"ggml_new_tensor_{len(shape)}d", made.context, ctypes.c_int(kind))
        weights = ctypes.c_void_p(create(*reversed(shape)).value)
        empty = _call("ggml_backend_buft_alloc_buffer", mine, 0)
        assert weights.value is not None
        ctypes.c_void_p.from_address(weights.value + _BUFFER_OFFSET).value = empty.value
        inputs = made.leaf(np.zeros((*shape[:-2], 4, shape[-1]), np.float32))
        product = made.op("ggml_mul_mat", weights, inputs)
        device = _call("ggml_backend_dev_by_type", ctypes.c_int(_CPU))
        supports = _function("ggml_backend_dev_supports_op", ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p)
        taken = bool(supports(device, product))
        _call("ggml_backend_buffer_free", empty)
        return taken


def attend(
    queries: Floats,
    keys: npt.NDArray[Any],
    values: npt.NDArray[Any],
    mask: Halves,
    threads: int,
    *,
    scale: float,
    largest_bias: float = 0.0,
    soft_cap: float = 0.0,
    sinks: Floats | None = None,
) -> Floats:
    """Attention as llama.cpp lays it out: queries (streams, queries, heads, head), keys and values (streams, cells,
    shared heads, head), mask (streams, 1, queries, cells); the result is shaped like the queries."""
    with graph() as made:
        turned = [
            made.op("ggml_permute", made.leaf(one), *map(ctypes.c_int, (0, 2, 1, 3))) for one in (queries, keys, values)
        ]
        floats = map(ctypes.c_float, (scale, largest_bias, soft_cap))
        result = made.op("ggml_flash_attn_ext", *turned, made.leaf(mask), *floats)
        if sinks is not None:
            _call("ggml_flash_attn_ext_add_sinks", result, made.leaf(sinks))
        return made.run(result, queries.shape, threads)
