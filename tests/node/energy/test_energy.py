"""Energy: meters read from recordings, and whose the joules are. Pure, so plain tables; the sampler on stand-ins."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pynvml
import pytest

from appliance.core import EngineLoad
from appliance.node.energy.account import EnergyAccount, EngineWork, compute_joules
from appliance.node.energy.meters import CPU_METER, MeterReading, NvmlMeters, RaplMeters, find_rapl
from appliance.node.energy.sampler import EnergyMeters, EnergySampler
from appliance.node.supervise.engine_supervisor import EngineSupervisor
from appliance.node.supervise.status import StatusPublisher
from appliance.state import State
from tests.node.machines import H200, Fails, FakeNvml, write_tree

STEP = 2.0
GPU0, GPU1 = frozenset({"GPU-0", "0"}), frozenset({"GPU-1", "1"})


def gpu(joules: float | None, watts: float | None = None, covers: frozenset[str] = GPU0) -> MeterReading:
    return MeterReading(f"gpu {min(covers - {'0', '1'})}", joules, watts, covers=covers, limit_watts=700.0)


def work(target: str = "onsite/a", busy: float = 0.0, cpu: float = 0.0, **changes: Any) -> EngineWork:
    given = EngineWork(target, frozenset({"GPU-0"}), busy > 0, busy, cpu)
    return replace(given, **changes)


class Bench:
    """An account, fed with intervals of two seconds."""

    def __init__(self) -> None:
        self.account, self.at, self.joules = EnergyAccount(), 0.0, {"GPU-0": 0.0, "GPU-1": 0.0, "cpu": 0.0}

    def step(
        self,
        watts: float,
        *works: EngineWork,
        second: float | None = None,
        cpu: float | None = None,
        machine: float = 0.0,
        seconds: float = STEP,
    ) -> dict[str, float]:
        self.at += seconds
        self.joules["GPU-0"] += watts * seconds
        readings = [gpu(self.joules["GPU-0"])]
        if second is not None:
            self.joules["GPU-1"] += second * seconds
            readings.append(gpu(self.joules["GPU-1"], covers=GPU1))
        if cpu is not None:
            self.joules["cpu"] += cpu * seconds
            readings.append(MeterReading(CPU_METER, self.joules["cpu"]))
        return dict(self.account.add_sample(self.at, readings, works, machine))

    def idle(self, watts: float = 80.0, times: int = 6, **more: Any) -> None:
        for _ in range(times):
            self.step(watts, work(), **more)


@pytest.mark.parametrize(
    ("before", "now", "seconds", "joules"),
    [
        (gpu(100.0), gpu(300.0), 2.0, 200.0),
        (gpu(None, 100.0), gpu(None, 300.0), 2.0, 400.0),
        (gpu(None, 100.0), gpu(None, 300.0), 60.0, None),
        (gpu(500.0, 50.0), gpu(10.0, 50.0), 2.0, None),
        (
            MeterReading("cpu", 260_000.0, wraps_joules=262_143.0),
            MeterReading("cpu", 57.0, wraps_joules=262_143.0),
            20.0,
            2200.0,
        ),
        (gpu(0.0), gpu(1e9), 2.0, None),
        (gpu(None), gpu(None), 2.0, None),
        (gpu(100.0), gpu(300.0), 0.0, None),
    ],
    ids=["counter", "power", "power too far apart", "loaded anew", "wraps", "absurd", "tells nothing", "no time"],
)
def test_what_a_meter_counted_between_two_readings(
    before: MeterReading, now: MeterReading, seconds: float, joules: float | None
) -> None:
    assert compute_joules(before, now, seconds) == (None if joules is None else pytest.approx(joules))


def test_idle_power_is_taken_off_and_the_rest_is_the_engines_per_busy_second() -> None:
    bench = Bench()
    bench.idle(80.0)
    assert bench.account.idle_watts == {"gpu GPU-0": pytest.approx(80.0)}
    assert bench.step(480.0, work(busy=0.5)) == {}, "half a second of work says too little"
    assert bench.step(480.0, work(busy=1.5)) == {"onsite/a": pytest.approx(2 * 400.0 * STEP / 2.0, rel=0.01)}


def test_the_sum_over_requests_is_what_was_counted_whatever_the_rates_are_wrong_by() -> None:
    bench = Bench()
    bench.idle(80.0)
    counted, charged = 0.0, 0.0
    for index in range(200):
        watts, busy = 80.0 + 10 * (index % 7), 3.0  # the rates claim three busy seconds in two
        counted += (watts - 80.0) * STEP
        found = bench.step(watts, work(busy=busy))
        charged += found["onsite/a"] * busy
    assert charged == pytest.approx(counted, rel=0.05)


def test_without_ever_having_seen_it_idle_nothing_is_claimed() -> None:
    bench = Bench()
    for _ in range(10):
        assert bench.step(500.0, work(busy=2.0)) == {}


def test_work_that_the_counters_tell_late_is_not_taken_for_idling() -> None:
    bench = Bench()
    bench.idle(80.0)
    bench.step(380.0, work())  # already at work; its counters will say so in the next interval
    found = bench.step(80.0, work(busy=2.0))
    assert found == {"onsite/a": pytest.approx(300.0)}
    assert bench.account.idle_watts["gpu GPU-0"] == pytest.approx(80.0)


def test_two_engines_on_one_gpu_share_by_their_busy_time() -> None:
    bench = Bench()
    bench.idle(80.0)
    found = bench.step(480.0, work("onsite/a", 3.0), work("onsite/b", 1.0))
    assert found["onsite/a"] * 3 + found["onsite/b"] * 1 == pytest.approx(800.0)
    assert found["onsite/a"] == pytest.approx(found["onsite/b"])


def test_an_engine_over_two_gpus_draws_from_both_and_one_on_the_first_is_not_charged_for_the_second() -> None:
    bench = Bench()
    wide = frozenset({"GPU-0", "GPU-1"})
    bench.idle(80.0, second=60.0)
    found = bench.step(280.0, work("onsite/wide", 2.0, devices=wide), second=360.0)
    assert found == {"onsite/wide": pytest.approx((200.0 + 300.0) * STEP / 2.0)}


def test_an_engine_of_which_one_gpu_is_not_metered_is_not_called_measured() -> None:
    bench = Bench()
    bench.idle(80.0)
    assert bench.step(480.0, work(busy=2.0, devices=frozenset({"GPU-0", "GPU-1"}))) == {}


def test_of_the_processors_energy_an_engine_is_given_its_share_of_the_time_that_all_programs_used() -> None:
    bench = Bench()
    on_cpu = work(devices=None)
    for _ in range(6):
        bench.step(0.0, on_cpu, cpu=30.0)
    found = bench.step(0.0, work(busy=2.0, cpu=3.0, devices=None), cpu=90.0, machine=4.0)
    assert found == {"onsite/a": pytest.approx((90.0 - 30.0) * STEP * 3 / 4 / 2.0)}


def test_a_gpu_engine_is_charged_with_its_processor_time_too() -> None:
    bench = Bench()
    bench.idle(80.0, cpu=30.0)
    found = bench.step(480.0, work(busy=2.0, cpu=1.0), cpu=50.0, machine=2.0)
    assert found == {"onsite/a": pytest.approx((400.0 * STEP + 20.0 * STEP / 2) / 2.0)}


def test_a_driver_that_goes_away_leaves_what_was_measured_and_its_return_disturbs_nothing() -> None:
    bench = Bench()
    bench.idle(80.0)
    before = bench.step(480.0, work(busy=2.0))
    bench.at += STEP
    assert bench.account.add_sample(bench.at, [], [work(busy=2.0)], 0.0) == before
    bench.joules["GPU-0"] = 5.0  # loaded anew: the counter begins again
    assert bench.step(480.0, work(busy=2.0)) == before
    assert bench.step(480.0, work(busy=2.0)) == {"onsite/a": pytest.approx(400.0, rel=0.01)}


def test_loading_a_model_is_neither_idling_nor_charged_to_a_request() -> None:
    bench = Bench()
    bench.idle(80.0)
    for _ in range(5):
        assert bench.step(300.0, work(is_active=True, is_ready=False)) == {}
    assert bench.account.idle_watts["gpu GPU-0"] == pytest.approx(80.0)


# --- meters


def test_a_gpu_tells_its_counter_its_power_and_all_names_it_is_known_by() -> None:
    part = {"nvmlDeviceGetUUID": "MIG-1"}
    whole = {
        **H200,
        "nvmlDeviceGetTotalEnergyConsumption": 12_345_678,
        "nvmlDeviceGetMigMode": (1, 1),
        "nvmlDeviceGetMaxMigDeviceCount": 7,
        "mig": [part],
    }
    (reading,) = NvmlMeters(FakeNvml(whole)).read()
    assert reading.joules == pytest.approx(12_345.678) and reading.watts == pytest.approx(76.512)
    assert reading.limit_watts == 700.0
    assert reading.covers == {"GPU-00000000-0000-0000-0000-000000000001", "0", "MIG-1"}


def test_a_gpu_without_a_counter_tells_its_power_alone_and_one_without_either_nothing() -> None:
    (with_power,) = NvmlMeters(FakeNvml(H200)).read()
    assert with_power.joules is None and with_power.watts is not None
    (mute,) = NvmlMeters(FakeNvml({"nvmlDeviceGetName": "Orin"})).read()
    assert mute.joules is None and mute.watts is None


def test_a_driver_that_goes_and_comes_back_has_no_readings_meanwhile() -> None:
    nvml = FakeNvml(H200)
    meters = NvmlMeters(nvml)
    assert len(meters.read()) == 1
    nvml.broken = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    assert meters.read() == () and nvml.shut_down == 1
    nvml.broken = None
    assert len(meters.read()) == 1 and nvml.started == 2
    assert NvmlMeters(None).read() == ()


def test_a_lost_gpu_has_no_reading_and_the_others_still_have_theirs() -> None:
    nvml = FakeNvml(H200, {**H200, "nvmlDeviceGetUUID": "GPU-2"})
    nvml.lose(0, pynvml.NVML_ERROR_GPU_IS_LOST)
    assert [one.meter for one in NvmlMeters(nvml).read()] == ["gpu GPU-2"]
    gone = FakeNvml(H200, nvmlDeviceGetCount=Fails(pynvml.NVML_ERROR_UNKNOWN))
    assert NvmlMeters(gone).read() == ()


def zones(tmp_path: Path, **energy: int) -> Path:
    """A server with two packages, memory metered apart, and domains that would count twice."""
    folders = {
        "intel-rapl:0": ("package-0", energy.get("package0", 0)),
        "intel-rapl:0:0": ("core", 999),
        "intel-rapl:0:1": ("dram", energy.get("dram", 0)),
        "intel-rapl:1": ("package-1", energy.get("package1", 0)),
        "intel-rapl:2": ("psys", 999),
        "intel-rapl-mmio:0": ("package-0", 999),
    }
    files: dict[str, str] = {}
    for folder, (name, value) in folders.items():
        at = f"sys/class/powercap/{folder}"
        files |= {f"{at}/name": name, f"{at}/energy_uj": str(value), f"{at}/max_energy_range_uj": "262143328850"}
    return write_tree(tmp_path, files)


def test_packages_and_memory_are_counted_once_and_a_counters_new_beginning_is_no_loss(tmp_path: Path) -> None:
    rapl = find_rapl(zones(tmp_path, package0=262_143_000_000, package1=1_000_000, dram=0))
    assert [zone.name for zone in rapl.zones] == ["package-0", "dram", "package-1"]
    meters = RaplMeters(rapl)
    (first,) = meters.read()
    zones(tmp_path, package0=1_671_150, package1=3_000_000, dram=500_000)
    (second,) = meters.read()
    assert first.joules is not None and second.joules is not None
    assert second.joules - first.joules == pytest.approx(2.0 + 2.0 + 0.5)


def test_counters_that_cannot_be_read_are_said_with_the_reason(tmp_path: Path) -> None:
    assert "no power meter" in find_rapl(tmp_path).reason
    root = zones(tmp_path)
    path = root / "sys/class/powercap/intel-rapl:0/energy_uj"
    path.unlink()
    path.mkdir()  # root, as whom tests may run, is kept out by nothing else
    rapl = find_rapl(root)
    assert rapl.zones == () and "/sys/class/powercap/intel-rapl:0/energy_uj cannot be read" in rapl.reason
    assert RaplMeters(rapl).read() == ()


def test_a_counter_that_vanishes_while_it_is_read_begins_anew_without_a_jump(tmp_path: Path) -> None:
    root = zones(tmp_path, package0=5_000_000)
    meters = RaplMeters(find_rapl(root))
    path = root / "sys/class/powercap/intel-rapl:0/energy_uj"
    meters.read()
    path.unlink()
    assert meters.read() == ()
    path.write_text("9000000")
    (reading,) = meters.read()
    assert reading.joules == pytest.approx(0.0)


# --- the sampler

LOAD = EngineLoad(0, 0, 8, 0, 0, 0, 0, 1000, 0, 0, 0, 1000.0, {1: 100.0})


class Scene:
    """A sampler over one engine and one GPU, moved by hand."""

    def __init__(self) -> None:
        self.now, self.millijoules = 0.0, 0
        self.state = State(lambda: self.now)
        self.signals = StatusPublisher(self.state, lambda: self.now)
        self.device = dict(H200) | {"nvmlDeviceGetUUID": "GPU-0", "nvmlDeviceGetTotalEnergyConsumption": 0}
        placement = SimpleNamespace(gpu=SimpleNamespace(devices=("GPU-0",)))
        self.engine = SimpleNamespace(
            target=SimpleNamespace(name="onsite/a"), load=LOAD, pid=None, is_busy=False, placement=placement
        )
        meters = EnergyMeters(NvmlMeters(FakeNvml(self.device)), RaplMeters(find_rapl(Path("/nowhere"))))
        self.sampler = EnergySampler(self.engines, self.signals, meters, lambda: self.now)
        self.shown: dict[str, Any] = {}

    def engines(self) -> Sequence[EngineSupervisor]:
        return (cast(EngineSupervisor, self.engine),)

    async def step(self, watts: float, written: int = 0) -> tuple[float, str]:
        self.now += STEP
        self.millijoules += int(watts * STEP * 1000)
        self.device["nvmlDeviceGetTotalEnergyConsumption"] = self.millijoules
        load = self.engine.load
        self.engine.load = replace(
            load, decode_tokens_total=load.decode_tokens_total + written, steps=load.steps + written
        )
        await self.sampler.sample()
        return self.signals._watts["onsite/a"]


@pytest.mark.anyio
async def test_what_an_engine_draws_is_assumed_at_its_limit_until_it_was_metered() -> None:
    scene = Scene()
    for _ in range(6):
        assert await scene.step(80.0) == (700.0, "assumed")
    watts, basis = await scene.step(480.0, written=200)
    assert watts == pytest.approx(400.0) and basis == "measured"


@pytest.mark.anyio
async def test_an_engine_that_was_started_anew_is_not_charged_with_negative_work() -> None:
    scene = Scene()
    for _ in range(6):
        await scene.step(80.0)
    await scene.step(480.0, written=200)
    scene.engine.load = LOAD
    assert (await scene.step(80.0))[1] == "measured"
