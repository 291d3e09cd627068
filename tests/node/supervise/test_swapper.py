"""Models taking turns: engines that are really started and stopped."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.api.endpoints.admin import list_readiness
from appliance.config import EngineSettings as EngineConfig
from appliance.core import EngineStatus
from appliance.engines.base import EngineMemory, EngineShape, Placement
from appliance.engines.llamacpp import LlamaCpp
from appliance.engines.vllm import Vllm
from appliance.node.plan.swap import RAM, SwapRules, find_initially_unloaded
from appliance.node.supervise.deps import SupervisorDeps
from appliance.node.supervise.launcher import ChildLauncher
from appliance.node.supervise.status import StatusPublisher
from appliance.node.supervise.supervisor import Supervisor
from appliance.node.supervise.swapper import Swapper
from appliance.router.capacity.admission import Admission
from appliance.router.capacity.request_load import RequestLoad
from appliance.state import State
from tests.node.processes import eventually
from tests.node.vllm_stage import fake_installed, placement

pytestmark = pytest.mark.anyio


class Scene:
    def __init__(self, folder: Path, placements: list[Placement], room: int, rules: SwapRules) -> None:
        self.state = State(time.monotonic)
        self.admission = Admission(self.state, time.monotonic)
        self.supervisor = Supervisor(
            placements,
            SupervisorDeps(
                launcher=ChildLauncher(folder / "logs"),
                status=StatusPublisher(self.state, time.monotonic),
                config=EngineConfig(start_seconds=60.0),
                drain_seconds=7.0,
                runtime_folder=folder / "run",
            ),
            {"llamacpp": LlamaCpp(), "vllm": Vllm(fake_installed(folder / "vllm"))},
        )
        self.unloaded = find_initially_unloaded(placements, {RAM: room})
        models = [placed.model for placed in placements]
        self.swapper = Swapper(self.supervisor, self.state, time.monotonic, {RAM: room}, rules, models)

    def view(self, model: str) -> EngineStatus:
        return self.state.snapshot.engines[f"onsite/{model}"]

    def is_ready(self, model: str) -> bool:
        return self.view(model).state == "ready" and self.view(model).load is not None

    async def request(self, model: str, seconds: float = 60.0) -> float:
        """Be let in at a model and leave again; how long that took."""
        target = self.state.snapshot.target(f"onsite/{model}")
        assert target is not None
        started = time.monotonic()
        slot = await self.admission.enter(target, RequestLoad(10, 10), is_residency_bound=False, wait_seconds=seconds)
        slot.release()
        return time.monotonic() - started


@asynccontextmanager
async def scene(folder: Path, placements: list[Placement], room: int, rules: SwapRules) -> AsyncIterator[Scene]:
    made = Scene(folder, placements, room, rules)
    await made.supervisor.start(made.unloaded)
    swapping = asyncio.create_task(made.swapper.run())
    try:
        yield made
    finally:
        swapping.cancel()
        await asyncio.gather(swapping, return_exceptions=True)
        await made.admission.aclose()
        await made.supervisor.stop()


def _small(model: str) -> Placement:
    return replace(placement(model=model), memory=EngineMemory(60, 0, 0, 0))


async def test_demand_swaps_the_unused_model_out_and_the_request_is_let_in(tmp_path: Path) -> None:
    rules = SwapRules(least_residence_seconds=0.5, cool_down_seconds=0.5)
    async with scene(tmp_path, [_small("m"), _small("n")], 100, rules) as stage:
        assert set(stage.unloaded) == {"n"}
        await eventually(lambda: stage.is_ready("m"), "the first model")
        assert stage.view("n").state == "stopped" and "loaded when wanted" in stage.view("n").reason
        await stage.request("n")
        assert stage.is_ready("n")
        assert stage.view("m").state == "stopped"
        assert stage.view("m").reason == "unloaded: n is wanted; loaded again when wanted"
        await stage.request("m")
        assert stage.is_ready("m") and stage.view("n").state == "stopped"


async def test_an_idle_model_gives_its_memory_back_and_is_loaded_when_wanted(tmp_path: Path) -> None:
    async with scene(tmp_path, [_small("m")], 100, SwapRules(idle_unload_seconds=0.5)) as stage:
        await eventually(lambda: stage.view("m").state == "ready", "the model")
        await eventually(lambda: stage.view("m").state == "stopped", "its rest")
        assert stage.view("m").reason.startswith("unloaded: not used for")
        (row,) = list_readiness(stage.state.snapshot, time.monotonic())
        assert row["ready"]  # a load balancer must not turn away from a node that only rests
        await stage.request("m")


async def test_a_resident_that_has_not_stayed_long_is_waited_for(tmp_path: Path) -> None:
    async with scene(tmp_path, [_small("m"), _small("n")], 100, SwapRules(least_residence_seconds=3600)) as stage:
        await eventually(lambda: stage.is_ready("m"), "the first model")
        with pytest.raises(Exception, match="stopped"):
            await stage.request("n", seconds=1.5)
        assert stage.is_ready("m")


@pytest.mark.slow
async def test_two_real_models_take_turns(tmp_path: Path, smollm2_path: Path) -> None:
    def real(model: str) -> Placement:
        shape = EngineShape(1, 2048, 4, 2048, 8)
        abilities = frozenset({"chat", "completions", "labels"})
        return Placement(model, "q4_1", "llamacpp", smollm2_path, shape, EngineMemory(60, 0, 0, 0), abilities, ())  # type: ignore[arg-type]

    rules = SwapRules(least_residence_seconds=1.0, cool_down_seconds=1.0)
    async with scene(tmp_path, [real("one"), real("two")], 100, rules) as stage:
        await eventually(lambda: stage.is_ready("one"), "the first model")
        taken = [await stage.request(model) for model in ("two", "one", "two")]
        print("swapped in", ", ".join(f"{seconds:.1f} s" for seconds in taken))  # noqa: T201
        assert stage.is_ready("two") and stage.view("one").state == "stopped"
