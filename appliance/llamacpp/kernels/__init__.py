"""Native kernels beside llama.cpp's own, in C++ for AVX-512 VNNI: quantised products, attention over float16.

ggml asks each of its "extra buffer types" whether it wants a tensor or an operation; the library adds one. It is
compiled when the engine is set up (`python -m appliance.llamacpp.kernels`) and loaded by `install`. Where it is
missing or does not fit, llama.cpp computes as ever, and the reason is told.
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
    find,
)

NAMES: Final = ("products with Q8_0, Q4_0 and Q4_1 weights", "attention")
_LLAMA: Final = re.compile(r"libllama\.so[.\d]*$")
_GGML: Final = re.compile(r"libggml[\w.-]*\.so[.\d]*$")
_MAPPED_COLUMNS: Final = 6
"""Of a line of /proc/self/maps, where the last one is a path."""


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
    def told(self) -> str:
        """One line for people."""
        if self.names:
            return f"{', '.join(self.names)} (AVX-512 VNNI)"
        return f"llama.cpp's own: {self.reason}" + (f" -> {self.remedy}" if self.remedy else "")


PLAIN: Final = Kernels(reason="left out by --plain-kernels")


def install(maps: Path = Path("/proc/self/maps")) -> Kernels:
    """Offer the kernels to every model that is loaded from now on. Never raises.

    llama_cpp must have been imported, and the process's first model must not have been loaded: ggml lists its buffer
    types once.
    """
    try:
        check_platform()
        check_llama_cpp()
        check_processor()
        path = find()
        if path is None:
            raise KernelsUnavailable("they have not been built", COMMAND)
        _share_symbols(maps)
        _load(path)
    except KernelsUnavailable as error:
        return Kernels(reason=error.message, remedy=error.remedy)
    return Kernels(NAMES)


def _share_symbols(maps: Path) -> None:
    """Make ggml's symbols visible to the library, which is linked to no ggml: which one has them is known only now.

    A build for many processors loads the best of its libggml-cpu-*.so when llama.cpp begins, and keeps it to itself.
    """
    llama = _loaded(maps, _LLAMA)
    if not llama:
        raise KernelsUnavailable("llama.cpp is not loaded in this process", "import llama_cpp before install()")
    try:
        ctypes.CDLL(llama[0], mode=os.RTLD_NOLOAD).llama_backend_init()
        for path in _loaded(maps, _GGML):
            ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_GLOBAL)
    except OSError as error:
        raise KernelsUnavailable(f"ggml's libraries cannot be shared: {error}", "run scripts/setup") from error


def _load(path: Path) -> None:
    try:
        installed = ctypes.CDLL(str(path), mode=os.RTLD_NOW).appliance_kernels_install()
    except (OSError, AttributeError) as error:
        remedy = f"{COMMAND} --remove, then {COMMAND}"
        raise KernelsUnavailable(f"the library does not load: {error}", remedy) from error
    if not installed:
        raise KernelsUnavailable("this processor lacks AVX-512 VNNI")


def _loaded(maps: Path, name: re.Pattern[str]) -> Sequence[str]:
    """Paths of this process's libraries with such a file name."""
    try:
        lines = maps.read_text("utf-8", "replace").splitlines()
    except OSError as error:
        raise KernelsUnavailable(f"what this process has loaded is not known: {error}") from error
    columns = (line.split(maxsplit=_MAPPED_COLUMNS - 1) for line in lines)
    paths = dict.fromkeys(words[-1] for words in columns if len(words) == _MAPPED_COLUMNS)
    return [path for path in paths if name.search(path.rpartition("/")[2])]
