"""Memory that is given back: what is left, and what reading it again gives."""

import ctypes
import mmap
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from appliance.llamacpp.memory_release import release_code_pages, release_file_pages, release_freed, release_pages
from appliance.llamacpp.model import LlamaModel

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux alone")


def resident_bytes(address: int) -> int:
    """Of the mapping that `address` lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"nothing is mapped at {address:#x}")


def address_of(memory: mmap.mmap) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def test_only_whole_pages_within_the_bounds_are_given_back() -> None:
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 4 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = b"x" * (4 * page)
    release_pages(address_of(memory) + 1, 3 * page - 2)
    assert memory[: 2 * page : page] == b"x\0"
    assert memory[2 * page :] == b"x" * (2 * page)


def test_bounds_without_a_whole_page_give_nothing_back() -> None:
    memory = ctypes.create_string_buffer(b"kept", 64)
    release_pages(ctypes.addressof(memory), -1)
    release_pages(ctypes.addressof(memory), 64)
    assert memory.value == b"kept"


def test_a_mapped_file_leaves_memory_and_reads_the_same_again(tmp_path: Path) -> None:
    path = tmp_path / "some weights.gguf"
    path.write_bytes(b"w" * (64 * mmap.PAGESIZE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        whole = bytes(mapped)
        address = address_of(mapped)
        assert resident_bytes(address) == len(whole)
        release_file_pages(path)
        assert resident_bytes(address) == 0
        assert bytes(mapped) == whole


def test_a_file_that_is_not_mapped_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "other weights.gguf"
    path.write_bytes(b"w" * (4 * mmap.PAGESIZE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        whole, address = bytes(mapped), address_of(mapped)
        release_file_pages(tmp_path / "absent.gguf")
        release_file_pages(path, maps=tmp_path / "no-maps")
        assert resident_bytes(address) == len(whole)


def test_only_code_that_a_file_backs_is_given_back(tmp_path: Path) -> None:
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 4 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = b"x" * (4 * page)
    start = address_of(memory)
    kinds = ("r-xp 0 08:01 9 /lib/code.so", "rw-p 0 08:01 9 /lib/code.so", "r-xp 0 00:00 0 [vdso]", "r-xp 0 00:00 0")
    bounds = [f"{start + number * page:x}-{start + (number + 1) * page:x}" for number in range(4)]
    maps = tmp_path / "maps"
    maps.write_text("".join(f"{where} {kind}\n" for where, kind in zip(bounds, kinds, strict=True)))
    release_code_pages(maps)
    assert memory[::page] == b"\0xxx"


def test_a_program_goes_on_after_its_code_and_freed_memory_went() -> None:
    release_code_pages()
    release_freed()
    assert np.linalg.norm(np.ones(4)) == 2.0


def test_more_rows_than_one_for_each_sequence_are_read_after_the_unread_ones_went(model: LlamaModel) -> None:
    model.memory_clear()
    model.batch.clear()
    rows = model.batch.outputs_max
    assert model.sequences < rows < model.sequence_ids
    model.batch.add_each([1] * rows, [0] * rows, list(range(rows)))
    assert model.decode() == 0
    assert np.isfinite(model.rows).all()
    assert np.allclose(model.rows[-1], model.rows[0], atol=0.1)
    model.memory_clear()
