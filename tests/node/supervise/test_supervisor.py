"""Engines under supervision, as real processes: ready, crashing, hanging, refusing to end, ending for good."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from appliance.catalog import EngineKind, ModelSpec, Variant
from appliance.config import EngineSettings as EngineConfig
from appliance.core import Ability, EngineState, EngineStatus, Target
from appliance.engines.base import EngineDefaults, EngineMemory, EngineShape, Placement
from appliance.errors import EngineFailed
from appliance.node.supervise.deps import SupervisorDeps
from appliance.node.supervise.launcher import Child, ChildLauncher
from appliance.node.supervise.sockets import SocketFolder
from appliance.node.supervise.status import StatusPublisher
from appliance.node.supervise.supervisor import Supervisor
from appliance.state import State
from tests.node.processes import eventually, group_members, is_running

pytestmark = pytest.mark.anyio

PROGRAM = Path(__file__).parents[1] / "fake_engine.py"
ROOT = Path(__file__).resolve().parents[3]
NAME = "onsite/fake"


class FakeKind(EngineDefaults):
    """The fake engine as a kind of engine that can be launched."""

    def __init__(self, *options: str) -> None:
        self._options = options

    @property
    def kind(self) -> EngineKind:
        return "llamacpp"

    @property
    def permanent_exits(self) -> frozenset[int]:
        return frozenset({2, 3})

    def build_argv(
        self, python: str, placement: Placement, *, socket: Path, parent_guard_fd: int, drain_seconds: float
    ) -> list[str]:
        return [python, str(PROGRAM), "--uds", str(socket), "--parent-guard-fd", str(parent_guard_fd), *self._options]

    def estimate_memory(
        self, model: ModelSpec, variant: Variant, *, context_tokens: int, sequences: int
    ) -> EngineMemory:
        return EngineMemory(0, 0, 0, 0)

    def list_abilities(self, model: ModelSpec) -> frozenset[Ability]:
        return frozenset({"chat"})


class NotingLauncher(ChildLauncher):
    """Remembers every child it has started."""

    def __init__(self, logs_folder: Path) -> None:
        super().__init__(logs_folder)
        self.children: list[Child] = []

    async def launch(self, *arguments: object) -> Child:
        child = await super().launch(*arguments)  # type: ignore[arg-type]
        self.children.append(child)
        return child


class Stage:
    """A supervisor with one fake engine, and ways to look at it and to upset it."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        drain_seconds: float = 5.0,
        stall_seconds: float = 60.0,
        abilities: frozenset[Ability] = frozenset({"chat"}),
    ) -> None:
        placement = Placement(
            model="fake",
            variant="q4_1",
            engine="llamacpp",
            path=Path("fake.gguf"),
            shape=EngineShape(2, 1024, 4, 1024, 8),
            memory=EngineMemory(0, 0, 0, 0),
            abilities=abilities,
            reasons=(),
        )
        self.state = State(time.monotonic)
        self.signals = StatusPublisher(self.state, time.monotonic)
        self.launcher = NotingLauncher(folder / "logs")
        self.seen: list[EngineState] = []
        self.supervisor = Supervisor(
            [placement],
            SupervisorDeps(
                launcher=self.launcher,
                status=self.signals,
                config=EngineConfig(start_seconds=20.0, stall_seconds=stall_seconds),
                drain_seconds=drain_seconds,
                runtime_folder=folder / "run",
                watts_per_busy_core=4.0,
            ),
            {"llamacpp": FakeKind(*options)},
        )

    @property
    def view(self) -> EngineStatus:
        return self.state.snapshot.engines[NAME]

    @property
    def pid(self) -> int:
        return self.launcher.children[-1].pid

    @property
    def socket(self) -> str:
        target = self.state.snapshot.target(NAME)
        assert target is not None
        return target.address.removeprefix("unix:")

    async def do(self, behaviour: str) -> httpx.Response | None:
        """Tell the engine how to behave; None where it could not even answer."""
        transport = httpx.AsyncHTTPTransport(uds=self.socket, verify=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=1) as client:
            try:
                return await client.post(f"/do/{behaviour}")
            except httpx.HTTPError:
                return None

    async def until(self, state: EngineState, restarts: int = 0) -> None:
        await eventually(lambda: self.view.state == state and self.view.restarts >= restarts, f"{state} {restarts}")


@asynccontextmanager
async def stage(
    folder: Path,
    *options: str,
    drain_seconds: float = 5.0,
    stall_seconds: float = 60.0,
    abilities: frozenset[Ability] = frozenset({"chat"}),
) -> AsyncIterator[Stage]:
    made = Stage(folder, *options, drain_seconds=drain_seconds, stall_seconds=stall_seconds, abilities=abilities)
    try:
        yield made
    finally:
        await made.supervisor.stop()
        for child in made.launcher.children:
            assert group_members(child.pid) == []


async def test_an_engine_becomes_a_target_that_is_ready(tmp_path: Path) -> None:
    async with stage(tmp_path) as scene:
        await scene.supervisor.start()
        assert scene.state.snapshot.target(NAME) is not None
        await scene.supervisor.wait_ready(20)
        assert scene.view.load is not None, "the first request would overflow"
        target = scene.state.snapshot.target(NAME)
        assert target is not None
        assert (target.location, target.model, target.context_tokens) == ("onsite", "fake", 1024)
        assert (scene.view.state, scene.view.watts) == ("ready", 8.0)
        assert scene.view.load and scene.view.load.kv_capacity_tokens == 1024
        assert os.stat(Path(scene.socket).parent).st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("found", "offered", "warned"),
    [
        (None, {"chat", "tools"}, False),
        ("chat tools logprobs", {"chat", "tools"}, False),
        ("chat completions", {"chat"}, True),
    ],
)
async def test_what_an_engine_cannot_do_after_all_is_offered_to_nobody_and_said(
    tmp_path: Path, found: str | None, offered: set[Ability], warned: bool
) -> None:
    options = () if found is None else ("--abilities", found)
    async with stage(tmp_path, *options, abilities=frozenset({"chat", "tools"})) as scene:
        await scene.supervisor.start()
        await scene.supervisor.wait_ready(20)
        target = scene.state.snapshot.target(NAME)
        assert target is not None and target.abilities == offered
        warnings = [one for one in scene.state.snapshot.warnings if one.code == "abilities_differ"]
        assert [("fake" in one.text, "tools" in one.text) for one in warnings] == [(True, True)] * warned


async def test_stopping_ends_everything_and_leaves_no_socket(tmp_path: Path) -> None:
    async with stage(tmp_path) as scene:
        await scene.supervisor.start()
        await scene.supervisor.wait_ready(20)
        reply = await scene.do("fork")
        assert reply is not None
        grandchild = reply.json()["pid"]
        await scene.supervisor.stop()
        assert scene.view.state == "stopped"
        assert not is_running(scene.pid) and not is_running(grandchild)
        assert list((tmp_path / "run").iterdir()) == []


async def test_kill_nine_is_seen_at_once_and_mended(tmp_path: Path) -> None:
    async with stage(tmp_path) as scene:
        await scene.supervisor.start()
        await scene.supervisor.wait_ready(20)
        first = scene.pid
        os.kill(first, signal.SIGKILL)
        await scene.until("failed")
        assert scene.view.load is None
        (warning,) = scene.state.snapshot.warnings
        assert warning.code == "engine_down"
        assert "the engine for fake was killed (signal 9)" in warning.text
        await scene.until("ready", restarts=1)
        assert scene.pid != first
        assert scene.state.snapshot.warnings == ()


async def test_a_crash_tells_its_last_words(tmp_path: Path) -> None:
    async with stage(tmp_path) as scene:
        await scene.supervisor.start()
        await scene.supervisor.wait_ready(20)
        await scene.do("crash")
        await scene.until("failed")
        assert scene.view.reason == "ended by itself with code 1: out of luck; starts again in 0.5 s"


async def test_a_first_start_that_fails_is_repeated(tmp_path: Path) -> None:
    async with stage(tmp_path, "--mode", "crash-once", "--counter", str(tmp_path / "starts")) as scene:
        await scene.supervisor.start()
        await scene.supervisor.wait_ready(20)
        assert scene.view.restarts == 1
        assert (tmp_path / "starts").read_text() == "xx"


@pytest.mark.parametrize("code", [2, 3])
async def test_a_start_that_cannot_succeed_is_not_repeated(tmp_path: Path, code: int) -> None:
    async with stage(tmp_path, "--mode", f"exit:{code}") as scene:
        await scene.supervisor.start()
        with pytest.raises(EngineFailed, match=f"fake ended by itself with code {code}: cannot go on"):
            await scene.supervisor.wait_ready(20)
        assert scene.view.state == "failed"
        assert len(scene.launcher.children) == 1


async def test_three_failed_starts_are_told_although_more_follow(tmp_path: Path) -> None:
    async with stage(tmp_path, "--mode", "exit:1") as scene:
        await scene.supervisor.start()
        with pytest.raises(EngineFailed, match="code 1: cannot go on; starts again in 2 s"):
            await scene.supervisor.wait_ready(20)
        assert len(scene.launcher.children) == 3


async def test_waiting_for_readiness_ends_when_its_time_is_over(tmp_path: Path) -> None:
    async with stage(tmp_path, "--mode", "never-ready") as scene:
        await scene.supervisor.start()
        with pytest.raises(EngineFailed, match=r"not ready within 0\.3 s"):
            await scene.supervisor.wait_ready(0.3)
        assert scene.view.state == "starting"


async def test_a_hung_engine_is_noticed_by_its_steps_and_restarted(tmp_path: Path) -> None:
    async with stage(tmp_path, stall_seconds=0.6) as scene:
        await scene.supervisor.start()
        await scene.supervisor.wait_ready(20)
        first = scene.pid
        await scene.do("work")
        await eventually(lambda: scene.view.load is not None and scene.view.load.steps > 5, "steps")
        assert scene.pid == first
        await scene.do("hang")
        await scene.until("ready", restarts=1)
        assert not is_running(first)


async def test_an_engine_that_ignores_sigterm_is_killed_after_the_drain(tmp_path: Path) -> None:
    async with stage(tmp_path, "--mode", "ignore-sigterm", drain_seconds=0.3) as scene:
        await scene.supervisor.start()
        await scene.supervisor.wait_ready(20)
        await scene.supervisor.stop()
        assert scene.view.state == "stopped"
        assert "not now" in scene.launcher.children[-1].last_lines()


async def test_a_frozen_engine_is_killed_when_told_to_stop(tmp_path: Path) -> None:
    async with stage(tmp_path, drain_seconds=0.3) as scene:
        await scene.supervisor.start()
        await scene.supervisor.wait_ready(20)
        os.kill(scene.pid, signal.SIGSTOP)
        await scene.supervisor.stop()
        assert not is_running(scene.pid)


async def test_a_program_that_cannot_be_started_becomes_a_warning(tmp_path: Path) -> None:
    async with stage(tmp_path) as scene:
        scene.launcher.launch = _cannot_launch  # type: ignore[method-assign]
        await scene.supervisor.start()
        await scene.until("failed")
        assert "could not be started: no such thing" in scene.state.snapshot.warnings[0].text


async def _cannot_launch(*_: object) -> Child:
    raise FileNotFoundError("no such thing")


async def test_a_fault_in_a_control_task_becomes_a_warning_and_the_task_goes_on(tmp_path: Path) -> None:
    async with stage(tmp_path) as scene:
        launch, faults = scene.launcher.launch, [RuntimeError("a fault of ours")]

        async def faulty(*arguments: object) -> Child:
            if faults:
                raise faults.pop()
            return await launch(*arguments)

        scene.launcher.launch = faulty  # type: ignore[method-assign]
        await scene.supervisor.start()
        await eventually(lambda: bool(scene.state.snapshot.warnings), "a warning")
        assert scene.state.snapshot.warnings[0].code == "control_task_failed"
        await scene.until("ready")
        assert scene.state.snapshot.warnings == ()


async def test_stopping_what_never_started_is_harmless(tmp_path: Path) -> None:
    async with stage(tmp_path) as scene:
        await scene.supervisor.stop()
        assert scene.launcher.children == []


async def test_a_stop_during_the_start_leaves_nothing(tmp_path: Path) -> None:
    async with stage(tmp_path, "--mode", "never-ready") as scene:
        await scene.supervisor.start()
        await eventually(lambda: bool(scene.launcher.children), "a process")
        await scene.supervisor.stop()
        assert not is_running(scene.pid)


def _target(name: str) -> Target:
    return Target(name, "hosted", "openai", "https://api.invalid/v1", "m", frozenset())


def _view(state: EngineState) -> EngineStatus:
    return EngineStatus(NAME, state, 0.0)


async def test_every_change_is_published_at_once_as_a_whole() -> None:
    state = State(time.monotonic)
    signals = StatusPublisher(state, time.monotonic, [_target("a/m")])
    signals.set_engine_targets([_target(NAME)])
    signals.publish_status(_view("starting"))
    before = state.snapshot
    signals.publish_status(_view("failed"))
    assert before.engines[NAME].state == "starting"
    assert state.snapshot.engines[NAME].state == "failed"
    signals.set_configured_targets([_target("b/m")])
    assert [target.name for target in state.snapshot.targets] == [NAME, "b/m"]
    signals.set_engine_targets([])
    assert state.snapshot.engines == {}


async def test_an_unchanged_warning_wakes_nobody() -> None:
    state = State(time.monotonic)
    signals = StatusPublisher(state, time.monotonic)
    signals.warn("disk", "full")
    published = state.snapshot
    signals.warn("disk", "full")
    signals.clear("other")
    assert state.snapshot is published
    signals.clear("disk")
    assert state.snapshot.warnings == ()


def test_a_long_path_is_given_up_for_a_short_one(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100) / "run"
    folder = SocketFolder(deep)
    try:
        assert len(str(folder.path / "12.sock")) <= 100
        assert folder.path.stat().st_mode & 0o777 == 0o700
    finally:
        folder.remove()
    assert not folder.path.exists()


def test_a_folder_that_cannot_be_made_is_given_up_for_another(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = SocketFolder(tmp_path / "file" / "run")
    assert folder.path.is_dir()
    folder.remove()


def test_folders_of_dead_processes_are_swept_and_those_of_live_ones_kept(tmp_path: Path) -> None:
    dead, live = tmp_path / "999999999-abc", tmp_path / f"{os.getpid()}-abc"
    for folder in (dead, live, tmp_path / "mine"):
        folder.mkdir()
        (folder / "0.sock").touch()
    SocketFolder(tmp_path).remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([live.name, "mine"])


ROUTER = """
import asyncio, sys
from pathlib import Path
from tests.node.supervise.test_supervisor import Stage

async def main():
    scene = Stage(Path(sys.argv[1]))
    await scene.supervisor.start()
    await scene.supervisor.wait_ready(20)
    reply = await scene.do("fork")
    print("engine", scene.pid, reply.json()["pid"], flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_kill_nine_of_the_router_takes_its_engine_along(tmp_path: Path) -> None:
    router = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ROUTER, str(tmp_path), stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    assert router.stdout is not None
    while not (line := await router.stdout.readline()).startswith(b"engine "):
        assert line, "the router ended early"
    engine, grandchild = (int(word) for word in line.split()[1:])
    assert is_running(engine)
    router.kill()
    await router.wait()
    await eventually(lambda: not is_running(engine), "the engine's end")
    os.kill(grandchild, signal.SIGKILL)  # the fake engine ends alone; the guard program ends whole groups


def test_where_the_folder_for_sockets_is_no_folder_another_one_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    folder = SocketFolder(tmp_path / "run")
    try:
        assert folder.path.is_dir() and tmp_path not in folder.path.parents
    finally:
        folder.remove()
