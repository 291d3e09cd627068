"""What this process may use of the machine's processors and memory: affinity and container limits, not the brochure."""

import os
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from appliance.node.hardware.cgroup import MemoryLimit, read_cpu_quota, read_memory_limit, round_down_cores
from appliance.node.hardware.kernel_files import read_kernel_file

_X86_FLAGS: Final = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "bmi2",
    "avx_vnni",
    "avx_vnni_int8",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512cd",
    "avx512dq",
    "avx512_vbmi",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "amx_fp16",
)
# asimd is NEON, asimddp its dot products.
_ARM_FLAGS: Final = ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "svebf16", "sme")
FLAGS: Final = frozenset(_X86_FLAGS + _ARM_FLAGS)
"""Instruction sets that decide how fast a quantisation is, as the kernel names them; others are left out."""


@dataclass(frozen=True, slots=True)
class NumaNode:
    """Processors and the memory that is nearest to them."""

    index: int
    cpus: tuple[int, ...]
    """Logical CPUs, those of them that this process may run on."""
    memory_total_bytes: int
    memory_free_bytes: int
    """Not used for anything; what could be handed out by dropping files is not in it."""


@dataclass(frozen=True, slots=True)
class Cpu:
    model: str
    architecture: str
    physical_cores: int | None
    """Of the machine; None if the system does not say."""
    logical_cores: int
    usable_cores: int
    """How many threads may compute at once without stepping on each other. At least 1."""
    usable_reason: str
    threads_per_core: int | None
    numa_nodes: int | None
    flags: frozenset[str]
    siblings: tuple[tuple[int, ...], ...] = ()
    """Of each physical core that this process may use, the logical CPUs it may run on: threads of one core share its
    arithmetic, so one thread a core computes. Empty if the system does not say."""
    nodes: tuple[NumaNode, ...] = ()


@dataclass(frozen=True, slots=True)
class Ram:
    total_bytes: int
    available_bytes: int
    """What the system could hand out now without swapping."""
    limit: MemoryLimit | None
    usable_bytes: int
    usable_reason: str


def read_cpu(root: Path = Path("/"), affinity: Iterable[int] | None = None) -> Cpu:
    """Processors as this process may use them. `affinity`: logical CPUs it may run on; None: ask the system."""
    allowed = frozenset(_affinity() if affinity is None else affinity)
    text = read_kernel_file(root / "proc/cpuinfo")
    cores = _cores(root)
    here = root == Path("/")
    physical = len(set(cores.values())) if cores else (psutil.cpu_count(logical=False) if here else None)
    logical = len(cores) or (psutil.cpu_count() if here else None) or len(allowed)
    usable, reason = _usable(root, cores, allowed, physical)
    return Cpu(
        model=_first(text, "model name", "Model", "Hardware") or platform.processor() or "unknown",
        architecture=platform.machine(),
        physical_cores=physical,
        logical_cores=logical,
        usable_cores=usable,
        usable_reason=reason,
        threads_per_core=round(logical / physical) if physical else None,
        numa_nodes=len(list((root / "sys/devices/system/node").glob("node[0-9]*"))) or None,
        flags=frozenset((_first(text, "flags", "Features") or "").split()) & FLAGS,
        siblings=_siblings(cores, allowed),
        nodes=tuple(_nodes(root, allowed)),
    )


def _siblings(cores: dict[int, str], allowed: frozenset[int]) -> tuple[tuple[int, ...], ...]:
    groups: dict[str, list[int]] = {}
    for cpu in sorted(allowed & cores.keys()):
        groups.setdefault(cores[cpu], []).append(cpu)
    return tuple(sorted(map(tuple, groups.values())))


def _nodes(root: Path, allowed: frozenset[int]) -> Iterator[NumaNode]:
    folders = (root / "sys/devices/system/node").glob("node[0-9]*")
    for folder in sorted(folders, key=lambda folder: int(folder.name[4:])):
        fields = dict(re.findall(r"(MemTotal|MemFree):\s+(\d+) kB", read_kernel_file(folder / "meminfo")))
        total, free = (int(fields.get(name, 0)) * 1024 for name in ("MemTotal", "MemFree"))
        cpus = tuple(cpu for cpu in _listed(read_kernel_file(folder / "cpulist")) if cpu in allowed)
        yield NumaNode(int(folder.name[4:]), cpus, total, free)


def _listed(text: str) -> Iterator[int]:
    """The kernel's way of writing a set of numbers: `0-3,8,10-11`."""
    for match in re.finditer(r"(\d+)(?:-(\d+))?", text):
        yield from range(int(match[1]), int(match[2] or match[1]) + 1)


def _usable(root: Path, cores: dict[int, str], allowed: frozenset[int], physical: int | None) -> tuple[int, str]:
    """Physical cores within the affinity, no more than the quota's whole cores, and the reason."""
    if cores:
        own = len({cores[cpu] for cpu in allowed if cpu in cores}) or 1
    else:
        own = min(len(allowed) or 1, physical or len(allowed) or 1)
    reason = f"{own} physical cores"
    if physical and own < physical:
        reason = f"affinity allows {own} of {physical} physical cores"
    quota = read_cpu_quota(root)
    if quota is not None and round_down_cores(quota) < own:
        return round_down_cores(quota), f"the quota of {quota.source} is {quota.cores:g} cores; {reason}"
    return own, reason


def read_ram(root: Path = Path("/")) -> Ram:
    """Memory as this process may use it. Where nothing can be read, 0 is usable: unknown is not free."""
    text = read_kernel_file(root / "proc/meminfo")
    fields = {match[1]: int(match[2]) * 1024 for match in re.finditer(r"(?m)^(\w+):\s+(\d+) kB", text)}
    if not fields and root == Path("/"):
        memory = psutil.virtual_memory()
        fields = {"MemTotal": memory.total, "MemAvailable": memory.available}
    total, available = fields.get("MemTotal", 0), fields.get("MemAvailable", 0)
    limit = read_memory_limit(root)
    if limit is not None and limit.left_bytes < available:
        reason = f"{limit.source} allows {limit.limit_bytes:,} bytes, of which {limit.left_bytes:,} are left"
        return Ram(total, available, limit, limit.left_bytes, reason)
    reason = f"{available:,} of {total:,} bytes are available" if total else "the system does not say what is free"
    return Ram(total, available, limit, available, reason)


def _affinity() -> Iterable[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def _cores(root: Path) -> dict[int, str]:
    """Logical CPU -> its physical core, for all CPUs that are online; empty if the system does not say."""
    cores = {}
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*"):
        core = read_kernel_file(folder / "topology/core_id").strip()
        if core:
            package = read_kernel_file(folder / "topology/physical_package_id").strip()
            # Clusters of one package may count their cores from 0 again; siblings tell them apart.
            siblings = read_kernel_file(folder / "topology/thread_siblings_list").strip()
            cores[int(folder.name[3:])] = f"{package}:{core}:{siblings}"
    return cores


def _first(text: str, *keys: str) -> str | None:
    """The value of the first line of /proc/cpuinfo that has one of `keys`."""
    for key in keys:
        found = re.search(rf"(?m)^{re.escape(key)}\s*:\s*(.+)$", text)
        if found:
            return found[1].strip()
    return None
