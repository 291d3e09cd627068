"""What a process may use of a machine, read from recorded /proc and /sys trees."""

from pathlib import Path

import pytest

from appliance.node.hardware.cpu import read_cpu, read_ram
from tests.node.machines import CGROUP_V1_MOUNTS, CGROUP_V2_MOUNT, GIB, meminfo, topology, write_tree

V2 = {"proc/self/mountinfo": CGROUP_V2_MOUNT, "proc/self/cgroup": "0::/app.slice/node.service\n"}
V1 = {
    "proc/self/mountinfo": CGROUP_V1_MOUNTS,
    "proc/self/cgroup": "3:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n",
}
V1_CPU, V1_MEMORY = "sys/fs/cgroup/cpu,cpuacct/docker/abc", "sys/fs/cgroup/memory/docker/abc"
SERVICE = "sys/fs/cgroup/app.slice/node.service"


def test_the_second_thread_of_a_core_is_not_counted(tmp_path: Path) -> None:
    cpu = read_cpu(write_tree(tmp_path, topology(8, threads_per_core=2)), range(16))
    assert (cpu.physical_cores, cpu.logical_cores, cpu.usable_cores, cpu.threads_per_core) == (8, 16, 8, 2)
    assert cpu.usable_reason == "8 physical cores"


def test_threads_of_one_core_stand_together_and_forbidden_ones_are_left_out(tmp_path: Path) -> None:
    cpu = read_cpu(write_tree(tmp_path, topology(4, threads_per_core=2)), {0, 4, 1, 6})
    assert cpu.siblings == ((0, 4), (1,), (6,))


def test_numa_nodes_tell_their_processors_and_memory(tmp_path: Path) -> None:
    node = "sys/devices/system/node/node"
    files = {
        f"{node}0/cpulist": "0-3,8\n",
        f"{node}1/cpulist": "4-7\n",
        f"{node}0/meminfo": "Node 0 MemTotal:       65536 kB\nNode 0 MemFree:        1024 kB\n",
        f"{node}1/meminfo": "Node 1 MemTotal:       65536 kB\nNode 1 MemFree:       32768 kB\n",
    }
    cpu = read_cpu(write_tree(tmp_path, topology(8) | files), range(6))
    assert [(node.index, node.cpus, node.memory_free_bytes) for node in cpu.nodes] == [
        (0, (0, 1, 2, 3), 1 << 20),
        (1, (4, 5), 32 << 20),
    ]


def test_equal_core_numbers_in_two_packages_are_two_cores(tmp_path: Path) -> None:
    cpu = read_cpu(write_tree(tmp_path, topology(8, packages=2)), range(8))
    assert (cpu.physical_cores, cpu.numa_nodes) == (8, 2)


def test_affinity_limits_the_cores_and_says_so(tmp_path: Path) -> None:
    cpu = read_cpu(write_tree(tmp_path, topology(8, threads_per_core=2)), {0, 8, 1})
    assert cpu.usable_cores == 2
    assert cpu.usable_reason == "affinity allows 2 of 8 physical cores"


@pytest.mark.parametrize(
    ("quota", "cores"), [("250000 100000", 2), ("50000 100000", 1), ("max 100000", 4), ("900000 100000", 4)]
)
def test_a_cgroup_v2_quota_is_rounded_down_to_whole_cores_and_never_to_none(
    tmp_path: Path, quota: str, cores: int
) -> None:
    write_tree(tmp_path, topology(4) | V2 | {f"{SERVICE}/cpu.max": quota})
    assert read_cpu(tmp_path, range(4)).usable_cores == cores


def test_the_tightest_quota_on_the_way_to_the_top_counts(tmp_path: Path) -> None:
    files = {f"{SERVICE}/cpu.max": "400000 100000", "sys/fs/cgroup/app.slice/cpu.max": "300000 100000"}
    cpu = read_cpu(write_tree(tmp_path, topology(8) | V2 | files), range(8))
    assert cpu.usable_cores == 3
    assert "/sys/fs/cgroup/app.slice is 3 cores" in cpu.usable_reason


def test_a_cgroup_v1_quota_counts_and_minus_one_means_none(tmp_path: Path) -> None:
    quota = {f"{V1_CPU}/cpu.cfs_quota_us": "150000", f"{V1_CPU}/cpu.cfs_period_us": "100000"}
    assert read_cpu(write_tree(tmp_path, topology(4) | V1 | quota), range(4)).usable_cores == 1
    write_tree(tmp_path, {f"{V1_CPU}/cpu.cfs_quota_us": "-1"})
    assert read_cpu(tmp_path, range(4)).usable_cores == 4


def test_a_container_that_sees_its_own_group_mounted_finds_its_quota(tmp_path: Path) -> None:
    mount = "30 24 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup ro"
    files = {"proc/self/mountinfo": mount, "proc/self/cgroup": "0::/docker/abc\n"}
    write_tree(tmp_path, topology(4) | files | {"sys/fs/cgroup/cpu.max": "200000 100000"})
    assert read_cpu(tmp_path, range(4)).usable_cores == 2


def test_a_group_outside_of_what_is_mounted_falls_back_to_the_mount(tmp_path: Path) -> None:
    mount = "30 24 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup ro"
    files = {"proc/self/mountinfo": mount, "proc/self/cgroup": "0::/elsewhere\n"}
    write_tree(tmp_path, topology(4) | files | {"sys/fs/cgroup/cpu.max": "200000 100000"})
    assert read_cpu(tmp_path, range(4)).usable_cores == 2


def test_only_the_instruction_sets_that_matter_are_kept(tmp_path: Path) -> None:
    text = "processor\t: 0\nmodel name\t: A CPU @ 2.00GHz\nflags\t\t: fpu avx2 avx512_bf16 amx_int8 rdtscp\n\n"
    cpu = read_cpu(write_tree(tmp_path, topology(1) | {"proc/cpuinfo": text}), [0])
    assert cpu.model == "A CPU @ 2.00GHz"
    assert cpu.flags == {"avx2", "avx512_bf16", "amx_int8"}


def test_an_arm_machine_tells_its_features(tmp_path: Path) -> None:
    text = "processor\t: 0\nFeatures\t: fp asimd evtstrm asimddp i8mm bf16 sve2\n"
    cpu = read_cpu(write_tree(tmp_path, topology(1) | {"proc/cpuinfo": text}), [0])
    assert cpu.flags == {"asimd", "asimddp", "i8mm", "bf16", "sve2"}


def test_without_topology_the_affinity_is_all_there_is(tmp_path: Path) -> None:
    cpu = read_cpu(tmp_path, range(3))
    assert (cpu.usable_cores, cpu.physical_cores, cpu.numa_nodes) == (3, None, None)


def test_memory_is_what_the_system_can_hand_out(tmp_path: Path) -> None:
    ram = read_ram(write_tree(tmp_path, meminfo(16 * GIB, 9 * GIB)))
    assert (ram.total_bytes, ram.usable_bytes, ram.limit) == (16 * GIB, 9 * GIB, None)


def test_a_cgroup_v2_limit_counts_without_the_files_the_kernel_would_drop(tmp_path: Path) -> None:
    group = {
        f"{SERVICE}/memory.max": str(4 * GIB),
        f"{SERVICE}/memory.current": str(3 * GIB),
        f"{SERVICE}/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7\n",
    }
    ram = read_ram(write_tree(tmp_path, meminfo(16 * GIB, 9 * GIB) | V2 | group))
    assert ram.usable_bytes == 2 * GIB
    assert ram.usable_reason.startswith(f"/{SERVICE} allows {4 * GIB:,} bytes")


def test_a_cgroup_v1_limit_counts_and_its_largest_number_means_none(tmp_path: Path) -> None:
    group = {
        f"{V1_MEMORY}/memory.limit_in_bytes": str(2 * GIB),
        f"{V1_MEMORY}/memory.usage_in_bytes": str(GIB),
        f"{V1_MEMORY}/memory.stat": "total_inactive_file 0\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    }
    assert read_ram(write_tree(tmp_path, meminfo(16 * GIB, 9 * GIB) | V1 | group)).usable_bytes == GIB
    write_tree(tmp_path, {f"{V1_MEMORY}/memory.limit_in_bytes": "9223372036854771712"})
    assert read_ram(tmp_path).limit is None


def test_a_limit_above_what_is_available_changes_nothing(tmp_path: Path) -> None:
    group = {f"{SERVICE}/memory.max": str(64 * GIB), f"{SERVICE}/memory.current": "0"}
    ram = read_ram(write_tree(tmp_path, meminfo(16 * GIB, 9 * GIB) | V2 | group))
    assert ram.usable_bytes == 9 * GIB


def test_unknown_memory_is_not_free(tmp_path: Path) -> None:
    assert read_ram(tmp_path).usable_bytes == 0


def test_this_very_machine_can_be_read() -> None:
    cpu, ram = read_cpu(), read_ram()
    assert 1 <= cpu.usable_cores <= cpu.logical_cores
    assert 0 < ram.usable_bytes <= ram.total_bytes
