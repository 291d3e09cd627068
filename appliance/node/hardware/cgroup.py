"""Limits that a container or a service manager puts on this process, from cgroup v1 and v2."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from appliance.node.hardware.kernel_files import read_kernel_file

_UNLIMITED_BYTES: Final = 1 << 60
"""v1 writes "no limit" as the largest page-aligned number; nothing this large is a limit."""


@dataclass(frozen=True, slots=True)
class CpuQuota:
    """CPU time allowed, in whole cores' worth (2.5: two and a half), and the file that says so."""

    cores: float
    source: str


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The tightest memory limit above this process, and what is left under it."""

    limit_bytes: int
    left_bytes: int
    source: str


def read_cpu_quota(root: Path) -> CpuQuota | None:
    """The smallest CPU quota on the way from this process's group to the top; None if there is none."""
    found = []
    for folder in _folders(root, "cpu"):
        cores = _quota_v2(folder / "cpu.max") or _quota_v1(folder)
        if cores is not None:
            found.append(CpuQuota(cores, _shown(folder, root)))
    return min(found, key=lambda quota: quota.cores, default=None)


def read_memory_limit(root: Path) -> MemoryLimit | None:
    """The limit that leaves least on the way from this process's group to the top; None if there is none."""
    found = []
    for folder in _folders(root, "memory"):
        limits = [_number(folder / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        real = [limit for limit in limits if limit is not None and limit < _UNLIMITED_BYTES]
        if real:
            limit = min(real)
            found.append(MemoryLimit(limit, max(0, limit - _held_bytes(folder)), _shown(folder, root)))
    return min(found, key=lambda limit: limit.left_bytes, default=None)


def _held_bytes(folder: Path) -> int:
    """What the group holds and the kernel would not give back by dropping files it has only read."""
    used = _number(folder / "memory.current")
    if used is None:
        used = _number(folder / "memory.usage_in_bytes") or 0
    reclaimable = 0
    for line in read_kernel_file(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file") and value.isdigit():
            reclaimable = max(reclaimable, int(value))
    return max(0, used - reclaimable)


def _quota_v2(path: Path) -> float | None:
    words = read_kernel_file(path).split()
    if len(words) != 2 or not words[0].isdigit() or not words[1].isdigit() or int(words[1]) == 0:
        return None
    return int(words[0]) / int(words[1])


def _quota_v1(folder: Path) -> float | None:
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota and quota > 0 and period else None


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """This process's group for `controller`, then every group above it as far as the mount shows them."""
    own = _own_paths(root)
    for kind, controllers, mount_root, mount_point in _mounts(root):
        if kind == "cgroup2":
            path = own.get("")
        elif controller in controllers:
            path = own.get(controller)
        else:
            continue
        if path is None:
            continue
        base = root / mount_point.relative_to("/")
        relative = _below(path, mount_root)
        for part in (relative, *relative.parents):
            folder = base / part
            if folder.is_dir():
                yield folder


def _below(path: PurePosixPath, mount_root: PurePosixPath) -> PurePosixPath:
    """`path` seen from the mount. A container often sees its own group mounted and its host's path named."""
    if path.is_relative_to(mount_root):
        return path.relative_to(mount_root)
    return PurePosixPath(".")


def _own_paths(root: Path) -> dict[str, PurePosixPath]:
    """Controller name -> path of this process's group; "" is cgroup v2's one group for all controllers."""
    paths = {}
    for line in read_kernel_file(root / "proc/self/cgroup").splitlines():
        fields = line.split(":", 2)
        if len(fields) == 3:
            for controller in fields[1].split(","):
                paths[controller] = PurePosixPath(fields[2])
    return paths


def _mounts(root: Path) -> Iterator[tuple[str, frozenset[str], PurePosixPath, PurePosixPath]]:
    """Of every cgroup mount: the kind, its controllers, which group it shows, and where."""
    for line in read_kernel_file(root / "proc/self/mountinfo").splitlines():
        before, separator, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if separator and len(left) >= 5 and len(right) >= 3 and right[0] in ("cgroup", "cgroup2"):
            yield right[0], frozenset(right[2].split(",")), PurePosixPath(left[3]), PurePosixPath(left[4])


def _shown(folder: Path, root: Path) -> str:
    return "/" + str(folder.relative_to(root))


def _number(path: Path) -> int | None:
    text = read_kernel_file(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def round_down_cores(quota: CpuQuota) -> int:
    """Whole cores under a quota, at least one: threads beyond them are stopped by the kernel in mid-step."""
    return max(1, math.floor(quota.cores))
