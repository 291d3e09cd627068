"""A supervisor with a vLLM that is a fake: the real command line, environment and readings, and a program behind them
that has vLLM's manners."""

import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from appliance.config import EngineSettings as EngineConfig
from appliance.core import EngineState, EngineStatus
from appliance.engines.base import EngineMemory, EngineShape, Placement
from appliance.engines.vllm import InstalledVllm, Vllm
from appliance.node.supervise import orphans
from appliance.node.supervise.deps import SupervisorDeps
from appliance.node.supervise.launcher import Child, ChildLauncher
from appliance.node.supervise.status import StatusPublisher
from appliance.node.supervise.supervisor import Supervisor
from appliance.state import State
from tests.node.processes import eventually, group_members

NAME = "onsite/m"
PROGRAM = Path(__file__).with_name("fake_vllm.py")


def fake_installed(folder: Path) -> InstalledVllm:
    """An environment whose `vllm` is the fake."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / "bin" / "vllm").symlink_to(PROGRAM)
    return InstalledVllm(folder, "0.32.0+cpu", is_cpu=True)


def placement(manner: str = "well", *, model: str = "m", context_tokens: int = 4096) -> Placement:
    return Placement(
        model=model,
        variant="bf16",
        engine="vllm",
        path=Path("/models/m"),
        shape=EngineShape(2, context_tokens, 4, context_tokens, 8),
        memory=EngineMemory(0, 1 << 30, 0, 0),
        abilities=frozenset({"chat", "completions", "labels", "token_logprobs"}),
        reasons=(),
        settings=(("--fake", manner),),
    )


class NotingLauncher(ChildLauncher):
    def __init__(self, logs_folder: Path) -> None:
        super().__init__(logs_folder)
        self.children: list[Child] = []

    async def launch(self, *arguments: object) -> Child:
        child = await super().launch(*arguments)  # type: ignore[arg-type]
        self.children.append(child)
        return child


class Stage:
    def __init__(self, folder: Path, placed: Placement, *, stall_seconds: float, drain_seconds: float) -> None:
        self.home = folder / "run"
        self.state = State(time.monotonic)
        self.signals = StatusPublisher(self.state, time.monotonic)
        self.launcher = NotingLauncher(folder / "logs")
        self.supervisor = Supervisor(
            [placed],
            SupervisorDeps(
                launcher=self.launcher,
                status=self.signals,
                config=EngineConfig(start_seconds=20.0, stall_seconds=stall_seconds),
                drain_seconds=drain_seconds,
                runtime_folder=self.home,
            ),
            {"vllm": Vllm(fake_installed(folder / "vllm"))},
        )

    @property
    def view(self) -> EngineStatus:
        return self.state.snapshot.engines[NAME]

    @property
    def leader(self) -> int:
        return self.launcher.children[-1].pid

    @property
    def socket(self) -> Path:
        target = self.state.snapshot.target(NAME)
        assert target is not None
        return Path(target.address.removeprefix("unix:"))

    def members(self) -> list[int]:
        """The processes of the engine, wherever they are: guard, front end, core."""
        return list(orphans.find_marked_processes(orphans.format_engine_mark(self.home)))

    async def post(self, path: str, key: str = "") -> httpx.Response:
        transport = httpx.AsyncHTTPTransport(uds=str(self.socket), verify=False)
        headers = {"authorization": f"Bearer {key or (self.socket.parent / 'key').read_text()}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=5) as client:
            return await client.post(path, headers=headers)

    async def until(self, state: EngineState, restarts: int = 0) -> None:
        await eventually(lambda: self.view.state == state and self.view.restarts >= restarts, f"{state} {restarts}")


@asynccontextmanager
async def stage(
    folder: Path, placed: Placement | None = None, *, stall_seconds: float = 60.0, drain_seconds: float = 7.0
) -> AsyncIterator[Stage]:
    made = Stage(folder, placed or placement(), stall_seconds=stall_seconds, drain_seconds=drain_seconds)
    try:
        yield made
    finally:
        await made.supervisor.stop()
        assert made.members() == []
        for child in made.launcher.children:
            assert group_members(child.pid) == []
