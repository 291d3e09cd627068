"""The C functions of llama.cpp, without the package around them."""

import subprocess
import sys


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout


def test_the_engine_loads_the_functions_and_not_the_package() -> None:
    told = _run(
        "import sys; import appliance.llamacpp.__main__, appliance.llamacpp.binding as b;"
        "print(b.lib.llama_max_devices() > 0, [name for name in ('llama_cpp', 'diskcache') if name in sys.modules])"
    )
    assert told.split() == ["True", "[]"]


def test_the_package_can_still_be_imported_before_and_after() -> None:
    after = "import appliance.llamacpp.binding as b, llama_cpp; print(llama_cpp.Llama, llama_cpp.llama_cpp.__name__)"
    assert "llama_cpp.llama_cpp" in _run(after)
    before = "import llama_cpp, appliance.llamacpp.binding as b; print(b.lib is llama_cpp.llama_cpp)"
    assert _run(before).strip() == "True"
