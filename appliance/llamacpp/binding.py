"""llama.cpp's C functions as `lib`: llama_cpp's ctypes module alone.

The package around it imports a chat server's needs as well, with a disk cache and SQLite: 9 MB and a quarter of a
second for an engine that calls nothing but C.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Final

__all__ = ["lib"]

_PACKAGE: Final = "llama_cpp"


def _ctypes_module() -> ModuleType:
    """The package's module without running the package. Whoever imports the package later gets all of it, afresh."""
    spec = None if _PACKAGE in sys.modules else importlib.util.find_spec(_PACKAGE)
    if spec is None:
        return importlib.import_module(f"{_PACKAGE}.llama_cpp")
    sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(f"{_PACKAGE}.llama_cpp")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
            del sys.modules[name]


if TYPE_CHECKING:
    import llama_cpp.llama_cpp as lib
else:
    lib = _ctypes_module()
