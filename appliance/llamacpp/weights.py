"""A model's file in llama.cpp: whether it is one, how its weights are written, and loading them."""

import ctypes
from collections import deque
from pathlib import Path
from typing import Any, Final

from appliance.errors import ModelFileError
from appliance.llamacpp.binding import lib

_GGUF_MAGIC: Final = b"GGUF"
_WARN, _ERROR = 3, 4  # ggml_log_level
_REPORTED_LINES: Final = 6
_FILE_TYPE: Final = b"general.file_type"
_GGUF_UINT32: Final = 4
_PACKED_FILE_TYPES: Final = (2, 3, 7)
"""llama_ftype of files that are for the most part Q4_0, Q4_1 or Q8_0: what `kernels` packs."""


class LlamaLog:
    """llama.cpp's log: kept, never printed. Its last lines go into the error when something fails."""

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

    def last_lines(self) -> str:
        """The last errors, or, where there were none, the last lines of any level."""
        grave = [line for level, line in self._lines if level in (_WARN, _ERROR)]
        lines = grave or [line for _, line in self._lines]
        return " | ".join(lines[-_REPORTED_LINES:]) or "llama.cpp gave no reason"


LOG: Final = LlamaLog()


class _GgufInitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


def check_gguf_file(path: Path) -> None:
    """Raises ModelFileError unless there is a file that begins as a GGUF file does."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise ModelFileError(f"{str(path)!r} does not exist: pull the model or correct the path") from None
    except OSError as error:
        raise ModelFileError(f"{str(path)!r} cannot be read ({error.strerror}): correct path or permissions") from error
    if magic != _GGUF_MAGIC:
        raise ModelFileError(f"{str(path)!r} is not a GGUF file (it begins with {magic!r}): pull the model again")


def has_packed_weights(path: Path) -> bool:
    """Whether most of a file's weights are of a kind that `kernels` packs. What cannot be read is not."""
    LOG.listen()
    init = lib._lib.gguf_init_from_file
    init.restype, init.argtypes = ctypes.c_void_p, (ctypes.c_char_p, _GgufInitParams)
    handle = init(str(path).encode(), _GgufInitParams(True, None))
    if not handle:
        return False
    context = ctypes.c_void_p(handle)
    try:
        lib._lib.gguf_find_key.restype = ctypes.c_int64
        key = ctypes.c_int64(lib._lib.gguf_find_key(context, _FILE_TYPE))
        # Asked for a number where there is none, the reader would end the process.
        if key.value < 0 or lib._lib.gguf_get_kv_type(context, key) != _GGUF_UINT32:
            return False
        return lib._lib.gguf_get_val_u32(context, key) in _PACKED_FILE_TYPES
    finally:
        lib._lib.gguf_free(context)


def load_weights(path: Path, *, mapped: bool) -> Any:
    """llama.cpp's handle of the model. Raises ModelFileError with llama.cpp's reason."""
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    if not mapped:
        params.load_mode = lib.LLAMA_LOAD_MODE_NONE
    handle = lib.llama_model_load_from_file(str(path).encode(), params)
    if not handle:
        raise ModelFileError(
            f"{str(path)!r} cannot be loaded, it is truncated, corrupt or of an unknown kind: pull it again. "
            f"llama.cpp says: {LOG.last_lines()}"
        )
    if not lib.llama_model_has_decoder(handle) or lib.llama_model_has_encoder(handle):
        lib.llama_model_free(handle)
        raise ModelFileError(f"{str(path)!r} is not a decoder-only language model: choose one that generates text")
    return handle
