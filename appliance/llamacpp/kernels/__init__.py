"""Native kernels beside llama.cpp's own, in C++ for AVX-512 VNNI: quantised products, attention over float16.

ggml asks each of its "extra buffer types" whether it wants a tensor or an operation; the library adds one. It is
compiled when the engine is set up (`python -m appliance.llamacpp.kernels`) and loaded by `install_kernels`. Where it is
missing or does not fit, llama.cpp computes as ever, and `Kernels.reason` says why.
"""

import ctypes
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from appliance.llamacpp.kernels.library import (
    COMMAND,
    KernelsUnavailable,
    check_llama_cpp,
    check_platform,
    check_processor,
    find_library,
)

NAMES: Final = ("products with Q8_0, Q4_0 and Q4_1 weights", "attention")
_LLAMA: Final = re.compile(r"/libllama\.so[.\d]*$")
_MAPPED: Final = re.compile(r"(?P<begin>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?:\S+ +){4}(?P<path>/.*)")
"""A line of /proc/self/maps that belongs to a file."""
_REGISTRY_CODE_OFFSET: Final = 8
"""Of the first function in a ggml_backend_reg: its code lies in the backend's library."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """What computes beside llama.cpp's own kernels in this process."""

    names: tuple[str, ...] = ()
    """Empty: nothing does."""
    reason: str = ""
    """Why nothing does."""
    remedy: str = ""
    """What would change that; empty where nothing would."""

    @property
    def summary(self) -> str:
        """One line for people."""
        if self.names:
            return f"{', '.join(self.names)} (AVX-512 VNNI)"
        return f"llama.cpp's own: {self.reason}" + (f" -> {self.remedy}" if self.remedy else "")


PLAIN_KERNELS: Final = Kernels(reason="left out by --plain-kernels")


def install_kernels(maps: Path = Path("/proc/self/maps")) -> Kernels:
    """Offer the kernels to every model that is loaded from now on. Never raises.

    llama_cpp must have been imported, and the process's first model must not have been loaded: ggml lists its buffer
    types once.
    """
    try:
        check_platform()
        check_llama_cpp()
        check_processor()
        path = find_library()
        if path is None:
            raise KernelsUnavailable("they have not been built", COMMAND)
        _share_symbols(maps)
        _load(path)
    except KernelsUnavailable as error:
        return Kernels(reason=error.message, remedy=error.remedy)
    return Kernels(NAMES)


def _share_symbols(maps: Path) -> None:
    """Make ggml's symbols visible to the library, which is linked to no ggml: which one has them is known only now.

    A build for many processors loads the best of its libggml-cpu-*.so when llama.cpp begins, keeps it to itself, and
    may leave others in memory that it has only tried.
    """
    loaded = [path for _, _, path in _mapped(maps) if _LLAMA.search(path)]
    if not loaded:
        raise KernelsUnavailable("llama.cpp is not loaded in this process", "import llama_cpp before install()")
    try:
        llama = ctypes.CDLL(loaded[0], mode=os.RTLD_NOLOAD)
        llama.llama_backend_init()
        llama.ggml_backend_reg_by_name.restype = ctypes.c_void_p
        registry = llama.ggml_backend_reg_by_name(b"CPU")
        if registry is None:
            raise KernelsUnavailable("llama.cpp has found no CPU backend", "run scripts/setup")
        code = ctypes.c_void_p.from_address(registry + _REGISTRY_CODE_OFFSET).value or 0
        backend = next(path for begin, end, path in _mapped(maps) if begin <= code < end)
        # ggml-base comes along, since the backend depends on it.
        ctypes.CDLL(backend, mode=os.RTLD_NOLOAD | os.RTLD_GLOBAL)
    except (OSError, AttributeError, StopIteration) as error:
        raise KernelsUnavailable(f"ggml's libraries cannot be shared: {error!r}", "run scripts/setup") from error


def _load(path: Path) -> None:
    try:
        installed = ctypes.CDLL(str(path), mode=os.RTLD_NOW).appliance_kernels_install()
    except (OSError, AttributeError) as error:
        remedy = f"{COMMAND} --remove, then {COMMAND}"
        raise KernelsUnavailable(f"the library does not load: {error}", remedy) from error
    if not installed:
        raise KernelsUnavailable("this processor lacks AVX-512 VNNI")


def _mapped(maps: Path) -> Sequence[tuple[int, int, str]]:
    """What this process has in memory of files: begin, end, path."""
    try:
        lines = maps.read_text("utf-8", "replace").splitlines()
    except OSError as error:
        raise KernelsUnavailable(f"what this process has loaded is not known: {error}") from error
    found = filter(None, map(_MAPPED.fullmatch, lines))
    return [(int(one["begin"], 16), int(one["end"], 16), one["path"]) for one in found]
