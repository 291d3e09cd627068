"""The real CPU engine under the real supervisor, with the embedded model."""

import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from appliance.catalog import load_catalog
from appliance.config import EngineSettings
from appliance.core import EngineStatus
from appliance.engines.base import Placement
from appliance.errors import EngineFailed
from appliance.node.hardware.probe import probe_hardware
from appliance.node.plan.models import ModelCandidate
from appliance.node.plan.planner import plan_placements
from appliance.node.supervise.deps import SupervisorDeps
from appliance.node.supervise.launcher import ChildLauncher
from appliance.node.supervise.status import StatusPublisher
from appliance.node.supervise.supervisor import Supervisor
from appliance.state import State
from tests.node.processes import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

CONFIG = EngineSettings(threads=1, context_tokens=4096, sequences=8)


@dataclass
class Scene:
    state: State
    supervisor: Supervisor
    placement: Placement
    home: Path

    @property
    def view(self) -> EngineStatus:
        return self.state.snapshot.engines[self.placement.target]

    def engine(self) -> psutil.Process:
        """The engine among this process's children: the one that serves the target's socket."""
        target = self.state.snapshot.target(self.placement.target)
        assert target is not None
        socket = target.address.removeprefix("unix:")
        return next(child for child in psutil.Process().children() if socket in child.cmdline())

    async def complete(self) -> str:
        target = self.state.snapshot.target(self.placement.target)
        assert target is not None
        transport = httpx.AsyncHTTPTransport(uds=target.address.removeprefix("unix:"), verify=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=60) as client:
            body = {"model": target.model, "prompt": "The sky is", "max_tokens": 8, "temperature": 0}
            response = await client.post("/v1/completions", json=body)
            response.raise_for_status()
            return str(response.json()["choices"][0]["text"])


def _scene(home: Path, model: Path) -> Scene:
    embedded = load_catalog().embedded
    (placement,) = plan_placements(
        probe_hardware(), [ModelCandidate(embedded, embedded.variants[0], model)], CONFIG
    ).placements
    state = State(time.monotonic)
    supervisor = Supervisor(
        [placement],
        SupervisorDeps(
            launcher=ChildLauncher(home / "logs"),
            status=StatusPublisher(state, time.monotonic),
            config=CONFIG,
            drain_seconds=5,
            runtime_folder=home / "run",
        ),
    )
    return Scene(state, supervisor, placement, home)


@pytest.fixture
async def scene(tmp_path: Path, smollm2_path: Path) -> AsyncIterator[Scene]:
    made = _scene(tmp_path, smollm2_path)
    await made.supervisor.start()
    yield made
    await made.supervisor.stop()


async def test_the_engine_becomes_ready_answers_and_is_ready_again_after_kill_nine(scene: Scene) -> None:
    await scene.supervisor.wait_ready(100)
    answer = await scene.complete()
    assert answer
    await eventually(lambda: scene.view.load is not None and scene.view.load.decode_tokens_total > 0, "its load")
    process = scene.engine()
    os.kill(process.pid, signal.SIGKILL)
    await eventually(lambda: scene.view.state == "failed", "the failure")
    await eventually(lambda: scene.view.state == "ready", "readiness")
    assert scene.view.restarts == 1
    assert await scene.complete() == answer


async def test_it_holds_no_more_memory_than_the_plan_says(scene: Scene) -> None:
    await scene.supervisor.wait_ready(100)
    await scene.complete()
    held = scene.engine().memory_info().rss
    assert 0.6 * scene.placement.memory.total_bytes < held < scene.placement.memory.total_bytes


def _cut_off(whole: Path, part: Path) -> Path:
    part.write_bytes(whole.read_bytes()[:1_000_000])
    return part


async def test_a_damaged_model_file_is_told_once_and_in_words(tmp_path: Path, smollm2_path: Path) -> None:
    made = _scene(tmp_path, _cut_off(smollm2_path, tmp_path / "damaged.gguf"))
    await made.supervisor.start()
    try:
        with pytest.raises(EngineFailed, match=r"code 3: .*damaged\.gguf"):
            await made.supervisor.wait_ready(60)
        assert made.view.restarts == 0
    finally:
        await made.supervisor.stop()
