"""What the health page says of GPUs that something has happened to."""

import asyncio
from dataclasses import replace

import pynvml
import pytest

from appliance.node.hardware.nvidia import read_gpus
from appliance.node.supervise.gpu_watch import find_gpu_problems, watch_gpus
from appliance.node.supervise.status import StatusPublisher
from appliance.state import State
from tests.node.machines import recorded_nvml
from tests.node.processes import eventually

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("recording", "expected"),
    [
        ("h200", {}),
        ("h200-busy", {}),
        ("h200-one-lost", {"0": "GPU 0 is lost: GPU is lost; reboot"}),
        ("h200-needs-reset", {"1": "GPU 1 is lost: GPU requires restart; reset it"}),
        ("driver-unloaded", {}),
    ],
)
async def test_lost_boards_are_told_with_what_to_do(recording: str, expected: dict[str, str]) -> None:
    gpus = read_gpus(0, 0, recorded_nvml(recording))
    found = find_gpu_problems(gpus, gpus)
    assert found.keys() == expected.keys()
    assert all(found[name].startswith(text) for name, text in expected.items())


async def test_heat_and_new_memory_errors_are_told_and_old_errors_are_not() -> None:
    seen = read_gpus(0, 0, recorded_nvml("h200"))
    (gpu,) = seen.devices
    bad = replace(gpu, ecc_uncorrected_errors=2, throttled=("hardware thermal slowdown",), temperature_celsius=92)
    text = find_gpu_problems(replace(seen, devices=(bad,)), seen)["0"]
    assert "2 uncorrected memory errors" in text and "hardware thermal slowdown at 92 C" in text
    before = replace(seen, devices=(replace(gpu, ecc_uncorrected_errors=2),))
    assert find_gpu_problems(before, before) == {}


async def test_a_warning_comes_with_the_trouble_and_goes_with_it() -> None:
    nvml = recorded_nvml("h200-one-lost")
    said: list[tuple[str, str]] = []
    changed = asyncio.Event()

    class Told(StatusPublisher):
        def warn(self, code: str, text: str, about: str = "") -> None:
            said.append(("warn", about))
            changed.set()

        def clear(self, code: str, about: str = "") -> None:
            said.append(("clear", about))
            changed.set()

    async def until(kind: str, name: str) -> None:
        while (kind, name) not in said:
            changed.clear()
            await asyncio.wait_for(changed.wait(), 10)

    watching = asyncio.create_task(watch_gpus(Told(State(lambda: 0.0), lambda: 0.0, ()), nvml, seconds=0.001))
    await until("warn", "0")
    nvml.replace_devices(recorded_nvml("h200-x8"))
    await until("clear", "0")
    nvml.broken = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    await until("warn", "driver")
    nvml.broken = None
    await until("clear", "driver")
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    assert nvml.shut_down >= 1


async def test_a_watch_that_fails_takes_its_warnings_back_since_the_next_one_does_not_know_them() -> None:
    state = State(lambda: 0.0)
    nvml = recorded_nvml("h200-one-lost")
    watching = asyncio.create_task(watch_gpus(StatusPublisher(state, lambda: 0.0, ()), nvml, seconds=0.001))
    await eventually(lambda: bool(state.snapshot.warnings), "a warning")
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    assert state.snapshot.warnings == ()
