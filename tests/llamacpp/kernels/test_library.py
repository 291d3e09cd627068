"""The kernels' library: when it is built and loaded, and what is said when it is not."""

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from appliance.llamacpp.kernels import install_kernels, library
from appliance.llamacpp.kernels.__main__ import main
from appliance.llamacpp.kernels.library import (
    FLAGS,
    LLAMA_CPP_PYTHON,
    PROCESSOR_FLAGS,
    KernelsUnavailable,
    build_library,
    check_processor,
    compute_library_key,
    find_library,
    identify_kernels,
    remove_library,
)
from tests.llamacpp.engine_program import end, health, start, until

ROOT = Path(__file__).resolve().parents[3]
GOOD_COMPILER = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
echo "no library" >"$2"
"""
BAD_COMPILER = """#!/bin/sh
echo "in file products.cpp" >&2
echo "products.cpp:9: error: no such intrinsic" >&2
exit 1
"""


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two empty folders to build into, on a processor that has everything."""
    folders = (tmp_path / "environment", tmp_path / "cache")
    monkeypatch.setattr(library, "list_library_folders", lambda: folders)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr("appliance.llamacpp.kernels.check_processor", lambda: None)
    monkeypatch.setattr(library, "check_processor", lambda: None)
    return folders


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that writes something; a test may write another one over it."""
    path = tmp_path / "a compiler"
    path.write_text(GOOD_COMPILER)
    path.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{path}'")
    return path


def other_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.3.99")


# ---- what it is made from ----


def test_the_kernels_are_for_the_llama_cpp_that_the_project_pins() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert f"llama-cpp-python=={LLAMA_CPP_PYTHON}" in project["project"]["dependencies"]


def test_another_source_version_or_machine_makes_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "sources"
    shutil.copytree(Path(library.__file__).parent, sources)
    keys = [compute_library_key.__wrapped__()]
    monkeypatch.setattr(library, "_FOLDER", sources)
    assert compute_library_key.__wrapped__() == keys[0], "wherever the sources lie"
    (sources / "products.cpp").write_text((sources / "products.cpp").read_text() + "\n")
    keys.append(compute_library_key.__wrapped__())
    (sources / "another.h").write_text("")
    keys.append(compute_library_key.__wrapped__())
    monkeypatch.setattr(platform, "machine", lambda: "another")
    keys.append(compute_library_key.__wrapped__())
    other_version(monkeypatch)
    keys.append(compute_library_key.__wrapped__())
    monkeypatch.setattr(library, "FLAGS", ("-O1",))
    keys.append(compute_library_key.__wrapped__())
    assert len(set(keys)) == len(keys)


@pytest.mark.slow
def test_the_sources_compile_without_a_warning(tmp_path: Path) -> None:
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("no g++ for x86-64 here")
    # GCC takes registers that its own intrinsics leave unset for a mistake.
    quiet = ("-Wno-maybe-uninitialized", "-Wno-uninitialized")
    include = f"-I{importlib.metadata.distribution('llama-cpp-python').locate_file('include')}"
    sources = sorted(map(str, Path(library.__file__).parent.glob("*.cpp")))
    command = ["g++", *FLAGS, "-Wall", "-Wextra", *quiet, "-Werror", include, "-o", str(tmp_path / "k.so"), *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- building ----


@pytest.mark.usefixtures("compiler")
def test_the_library_is_built_once_and_found_then(
    places: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_library() is None and identify_kernels() == "plain"
    assert main([]) == 0
    path = places[0] / f"{compute_library_key()}.so"
    assert capsys.readouterr().out == f"{path}\n"
    assert list(places[0].iterdir()) == [path] and find_library() == path
    assert identify_kernels() == f"kernels-{compute_library_key()[:8]}"
    path.write_text("as it was")
    assert build_library() == path and path.read_text() == "as it was\n"[:-1]

    assert main(["--remove"]) == 0
    assert find_library() is None and remove_library() == ()


@pytest.mark.usefixtures("compiler")
def test_where_the_environment_cannot_be_written_the_users_cache_is(places: tuple[Path, Path]) -> None:
    places[0].write_text("a file, and no folder")
    assert build_library() == places[1] / f"{compute_library_key()}.so" == find_library()
    remove_library()
    places[1].rmdir()
    places[1].write_text("a file as well")
    with pytest.raises(KernelsUnavailable, match=r"environment: .*; .*cache: "):
        build_library()


def test_a_machine_without_a_compiler_is_told_what_to_install(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main([]) == 1
    said = capsys.readouterr().err
    assert "no-such-compiler" in said and "apt install g++" in said and said.count("\n") == 1
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(KernelsUnavailable, match=r"g\+\+, c\+\+, clang\+\+"):
        build_library()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing_behind(
    places: tuple[Path, Path], compiler: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler.write_text(BAD_COMPILER)
    assert main([]) == 1
    said = capsys.readouterr().err
    assert "products.cpp:9: error: no such intrinsic" in said and "CXX" in said and said.count("\n") == 1
    assert not list(places[0].iterdir())


def test_unknown_arguments_end_the_program_with_2() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--nonsense"])
    assert ended.value.code == 2


@pytest.mark.usefixtures("places", "compiler")
def test_another_llama_cpp_is_neither_built_for_nor_loaded_into(monkeypatch: pytest.MonkeyPatch) -> None:
    build_library()
    other_version(monkeypatch)
    with pytest.raises(KernelsUnavailable, match=rf"{LLAMA_CPP_PYTHON}.*0\.3\.99"):
        build_library()
    told = install_kernels()
    assert not told.names and identify_kernels() == "plain"
    assert LLAMA_CPP_PYTHON in told.reason and "0.3.99" in told.reason and LLAMA_CPP_PYTHON in told.remedy


@pytest.mark.usefixtures("places")
@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("linux", "aarch64"), ("win32", "x86_64")])
def test_other_platforms_do_without(system: str, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(KernelsUnavailable, match=f"{system} on {machine}"):
        build_library()
    assert machine in install_kernels().reason and not install_kernels().remedy


# ---- loading ----


def test_a_processor_that_lacks_an_instruction_is_told_which(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: fpu {' '.join(PROCESSOR_FLAGS)}\n")
    check_processor(cpuinfo)
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu fma avx512f f16c avx512bw avx512vl\n")
    with pytest.raises(KernelsUnavailable, match="lacks avx512dq, avx512_vnni"):
        check_processor(cpuinfo)
    with pytest.raises(KernelsUnavailable, match="not known"):
        check_processor(tmp_path / "nothing")


@pytest.mark.usefixtures("places")
def test_kernels_that_are_not_built_are_told_with_the_command_that_builds_them() -> None:
    told = install_kernels()
    assert not told.names and "not been built" in told.reason
    assert told.remedy in told.summary and told.remedy == "python -m appliance.llamacpp.kernels"


@pytest.mark.usefixtures("places", "compiler")
def test_a_library_that_does_not_load_is_a_reason_and_no_error(tmp_path: Path) -> None:
    build_library()
    import llama_cpp

    assert llama_cpp.__version__ == LLAMA_CPP_PYTHON
    told = install_kernels()
    assert not told.names and "does not load" in told.reason and "--remove" in told.remedy
    nothing = tmp_path / "maps"
    nothing.write_text("7f00-7f01 r-xp 00000000 08:01 17 /usr/lib/libc.so.6\n7f01-7f02 rw-p 00000000 00:00 0\n")
    assert "llama.cpp is not loaded" in install_kernels(nothing).reason


@pytest.mark.usefixtures("built")
def test_another_backend_in_memory_is_not_mistaken_for_the_one_in_use() -> None:
    # As a build for many processors may leave one behind: the wheel holds each library twice.
    code = (
        "import ctypes, pathlib, llama_cpp; from tests.llamacpp.kernels import graphs; "
        "other = pathlib.Path(llama_cpp.__file__).parent / 'lib' / 'libggml-cpu.so'; "
        "ctypes.CDLL(str(other)) if other.exists() else None; "
        "graphs.begin(False); print(graphs.kernels().reason, graphs.buffer_type() is not None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "True"


def test_the_control_plane_asks_for_their_identity_without_llama_cpp() -> None:
    code = (
        "import sys; from appliance.node.calibrate.calibration_store import read_llama_cpp_identity as told; "
        "print(told(), [name for name in sys.modules if name.startswith('llama_cpp')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip().endswith(" []") and done.stdout.startswith(LLAMA_CPP_PYTHON)


@pytest.mark.parametrize("more", [[], ["--plain-kernels"]])
def test_the_engine_tells_which_kernels_compute(more: list[str], smollm2_path: Path, tmp_path: Path) -> None:
    program = start(tmp_path, smollm2_path, *more)
    try:
        until(lambda: health(program.uds) == 200, "readiness")
        (told,) = [event["kernels"] for event in program.events() if event["event"] == "kernels"]
    finally:
        end(program)
    if more:
        assert "left out by --plain-kernels" in told
    else:
        assert ("AVX-512 VNNI" in told) == (identify_kernels() != "plain"), json.dumps(told)
