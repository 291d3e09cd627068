"""The kernels' library as a file: what it is made from, where it lies, and the compiler's run that makes it.

It imports neither llama.cpp nor numpy, so the control plane can ask for its identity.
"""

import hashlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Final

from appliance.errors import OperatorError
from appliance.files import replacing_file

LLAMA_CPP_PYTHON: Final = "0.3.36"
"""The one release whose ggml `ggml_inside.h` mirrors. Another one may lay its structs out otherwise, so with another
one nothing is built and nothing is loaded."""
COMMAND: Final = "python -m appliance.llamacpp.kernels"
PROCESSOR_FLAGS: Final = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "fma", "f16c")
"""What the library's instructions need of a processor, as Linux names it; FLAGS names the same for the compiler."""
FLAGS: Final = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden"),
    *(f"-m{flag.replace('_', '')}" for flag in PROCESSOR_FLAGS),
)

_DISTRIBUTION: Final = "llama-cpp-python"
_FOLDER: Final = Path(__file__).resolve().parent
_COMPILERS: Final = ("g++", "c++", "clang++")
_COMPILE_SECONDS: Final = 600.0
"""It takes two seconds on an idle core; a machine may be busy, but a compiler that hangs must not hang a set-up."""
_SAID_CHARS: Final = 300


class KernelsUnavailable(OperatorError):
    """The kernels cannot be built or loaded. `remedy` is empty where nothing would help on this machine."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.remedy = remedy


def check_llama_cpp() -> None:
    """Raises KernelsUnavailable unless the llama.cpp is installed that the kernels were written for."""
    try:
        version = importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise KernelsUnavailable(f"{_DISTRIBUTION} is not installed", "run scripts/setup") from None
    if version != LLAMA_CPP_PYTHON:
        raise KernelsUnavailable(
            f"the kernels are for {_DISTRIBUTION} {LLAMA_CPP_PYTHON}, and {version} is installed",
            f"install {_DISTRIBUTION}=={LLAMA_CPP_PYTHON} (scripts/setup does)",
        )


def check_platform() -> None:
    """Raises KernelsUnavailable where there is no processor of the kind that the kernels are for."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise KernelsUnavailable(
            f"the kernels are for Linux on x86-64 processors, and this is {sys.platform} on {platform.machine()}"
        )


def check_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """Raises KernelsUnavailable where the processor lacks an instruction: the library may not even be loaded then."""
    try:
        lines = cpuinfo.read_text("utf-8", "replace").splitlines()
    except OSError as error:
        raise KernelsUnavailable(f"what the processor can do is not known: {error}") from error
    has = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set[str]())
    missing = [flag for flag in PROCESSOR_FLAGS if flag not in has]
    if missing:
        raise KernelsUnavailable(f"this processor lacks {', '.join(missing)}")


@cache
def compute_library_key() -> str:
    """A sha256 over everything that the library follows from."""
    try:
        version = importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    digest = hashlib.sha256(repr((FLAGS, version, platform.machine())).encode())
    for path in _sources("*.h", "*.cpp"):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def list_library_folders() -> tuple[Path, ...]:
    """Where the library may lie: the environment's own folder first, then the user's cache."""
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(sys.prefix) / "lib" / "appliance", cache_folder / "appliance" / "kernels"


def find_library() -> Path | None:
    """The library that was built from these very sources, if it was."""
    return next(
        (path for folder in list_library_folders() if (path := folder / f"{compute_library_key()}.so").is_file()), None
    )


def identify_kernels() -> str:
    """What figures measured with the kernels rest on; "plain" where llama.cpp computes alone."""
    try:
        check_llama_cpp()
        check_platform()
        check_processor()
    except KernelsUnavailable:
        return "plain"
    return f"kernels-{compute_library_key()[:8]}" if find_library() is not None else "plain"


def build_library() -> Path:
    """The library's path, compiled if it is not there yet. Raises KernelsUnavailable with what would help."""
    check_platform()
    check_llama_cpp()
    found = find_library()
    if found is not None:
        return found
    compiler, headers = _compiler(), _headers()
    problems = []
    for folder in list_library_folders():
        path = folder / f"{compute_library_key()}.so"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing_file(path) as draft:
                draft.touch()  # The compiler's own words about a folder that cannot be written are harder to read.
                _compile([*compiler, *FLAGS, f"-I{headers}", "-o", str(draft), *map(str, _sources("*.cpp"))])
        except OSError as error:
            problems.append(f"{folder}: {error.strerror}")
            continue
        return path
    raise KernelsUnavailable(f"no folder for the kernels can be written ({'; '.join(problems)})", "make one writable")


def remove_library() -> tuple[Path, ...]:
    """Take the library away wherever it lies; the paths it lay at. Raises KernelsUnavailable where that is refused."""
    removed = []
    while (path := find_library()) is not None:
        try:
            path.unlink()
        except OSError as error:
            raise KernelsUnavailable(
                f"{path} cannot be removed ({error.strerror})", "remove it as its owner"
            ) from error
        removed.append(path)
    return tuple(removed)


def _sources(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in _FOLDER.glob(pattern))


def _compiler() -> list[str]:
    wanted = shlex.split(os.environ.get("CXX", ""))
    names = wanted[:1] or _COMPILERS
    for name in names:
        if shutil.which(name) is not None:
            return wanted or [name]
    raise KernelsUnavailable(
        f"there is no C++ compiler ({', '.join(names)})",
        f"install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++) or name it in CXX, then {COMMAND}",
    )


def _headers() -> Path:
    """ggml's public headers, which come with llama-cpp-python's wheel."""
    folder = Path(str(importlib.metadata.distribution(_DISTRIBUTION).locate_file("include")))
    if not (folder / "ggml-cpu.h").is_file():
        raise KernelsUnavailable(f"ggml's headers are not in {folder}", "rm -rf .venv, then run scripts/setup")
    return folder


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_COMPILE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(
            f"{command[0]} does not run: {error}", f"name another one in CXX, then {COMMAND}"
        ) from error
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        said = next((line for line in lines if "error" in line), lines[-1])
        raise KernelsUnavailable(
            f"{command[0]} cannot compile the kernels: {said[:_SAID_CHARS]}",
            f"name another compiler in CXX (GCC from 9 on, Clang from 9 on), then {COMMAND}",
        )
