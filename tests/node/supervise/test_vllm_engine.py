"""vLLM's surprises under supervision. The numbers are those of the table in appliance/docs/vllm.md."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.engines.base import GpuShare
from appliance.errors import EngineFailed
from appliance.node.supervise import orphans
from appliance.upstream.local import LocalTransport
from tests.node.processes import eventually, is_running
from tests.node.vllm_stage import NAME, placement, stage

pytestmark = pytest.mark.anyio


async def test_1_an_exit_with_code_0_that_nobody_asked_for_is_a_crash_and_is_mended(tmp_path: Path) -> None:
    async with stage(tmp_path) as scene:
        await scene.supervisor.start()
        await scene.supervisor.wait_ready(20)
        await scene.post("/do/core-dies")
        await scene.until("failed")
        assert scene.view.reason.startswith("ended by itself with code 0")
        await scene.until("ready", restarts=1)


async def test_2_sigterm_goes_to_the_front_end_alone_and_what_is_under_way_is_finished(tmp_path: Path) -> None:
    async with stage(tmp_path) as scene:
        await scene.supervisor.start()
        await scene.supervisor.wait_ready(20)
        slow = asyncio.create_task(scene.post("/v1/slow"))
        await eventually(lambda: bool(scene.view.load and scene.view.load.running_sequences), "the request")
        await scene.supervisor.stop()
        assert (await slow).status_code == 200
        assert scene.view.reason == "stopped as asked"


async def test_3_while_it_loads_it_is_killed_for_sigterm_would_be_lost(tmp_path: Path) -> None:
    async with stage(tmp_path, placement("slow-start")) as scene:
        await scene.supervisor.start()
        await eventually(lambda: "loading weights" in scene.view.reason, "progress")
        started = time.monotonic()
        await scene.supervisor.stop()
        assert time.monotonic() - started < 1.5
        assert scene.view.state == "stopped"


async def test_5_a_hung_core_is_noticed_by_a_token_that_does_not_come(tmp_path: Path) -> None:
    """/health says 200 and the gauges say 0 all the while, and nobody but the supervisor asks for anything."""
    async with stage(tmp_path, stall_seconds=1.0) as scene:
        await scene.supervisor.start()
        await scene.supervisor.wait_ready(20)
        first = scene.leader
        started = time.monotonic()
        await scene.post("/do/hang")
        await scene.until("failed")
        assert "no step was done" in scene.view.reason
        assert 0.9 < time.monotonic() - started < 4.0
        await scene.until("ready", restarts=1)
        assert not is_running(first)


async def test_5_an_idle_engine_that_answers_probes_is_left_alone(tmp_path: Path) -> None:
    async with stage(tmp_path, stall_seconds=0.4) as scene:
        await scene.supervisor.start()
        await scene.supervisor.wait_ready(20)
        await eventually(lambda: bool(scene.view.load and scene.view.load.steps >= 3), "three probes answered")
        assert scene.view.restarts == 0 and scene.view.state == "ready"


@pytest.mark.parametrize("manner", ["well", "escaping-core"])
async def test_6_kill_nine_of_the_front_end_leaves_no_core_behind(tmp_path: Path, manner: str) -> None:
    async with stage(tmp_path, placement(manner)) as scene:
        await scene.supervisor.start()
        await scene.supervisor.wait_ready(20)
        before = scene.members()
        assert len(before) == 3
        front_end = next(pid for pid in before if b"--uds" in _command(pid) and b"parent_guard" not in _command(pid))
        os.kill(front_end, signal.SIGKILL)
        await scene.until("ready", restarts=1)
        assert not any(is_running(pid) for pid in before)


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


async def test_6_cores_that_an_earlier_node_left_are_ended_before_anything_is_started(tmp_path: Path) -> None:
    home = tmp_path / "run"
    orphan, other = _marked_process(home), _marked_process(tmp_path / "run2")
    try:
        await asyncio.to_thread(eventually_marked, home)
        async with stage(tmp_path) as scene:
            await scene.supervisor.start()
            assert await asyncio.to_thread(orphan.wait) == -signal.SIGKILL
            assert other.poll() is None
    finally:
        for process in (orphan, other):
            process.kill()
            process.wait()


async def test_6_a_core_that_wrote_its_title_over_its_environment_is_found_by_its_session(tmp_path: Path) -> None:
    core, other = _titled_process("VLLM::EngineCore"), _titled_process("somebody else")
    left = tmp_path / "run" / "999999999-abc" / "0"
    left.mkdir(parents=True)
    (left / "session").write_text(str(core.pid))
    another = tmp_path / "run" / "999999999-def" / "0"
    another.mkdir(parents=True)
    (another / "session").write_text(str(other.pid))
    try:
        async with stage(tmp_path) as scene:
            await scene.supervisor.start()
            assert await asyncio.to_thread(core.wait) == -signal.SIGKILL
            assert other.poll() is None
    finally:
        for process in (core, other):
            process.kill()
            process.wait()


def _titled_process(title: str) -> "subprocess.Popen[bytes]":
    command = [title, "-c", "import time; time.sleep(600)"]
    return subprocess.Popen(command, executable=sys.executable, env={}, start_new_session=True)


def _marked_process(home: Path) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, orphans.ENGINE_MARK_VARIABLE: orphans.format_engine_mark(home, "m")}
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=environment, process_group=0)


def eventually_marked(home: Path) -> None:
    until = time.monotonic() + 10
    while not orphans.find_marked_processes(orphans.format_engine_mark(home)):
        assert time.monotonic() < until
        time.sleep(0.01)


async def test_7_and_8_sockets_that_it_leaves_behind_hinder_no_later_start(tmp_path: Path) -> None:
    async with stage(tmp_path) as scene:
        await scene.supervisor.start()
        await scene.supervisor.wait_ready(20)
        folder = scene.socket.parent
        assert len([path for path in folder.iterdir() if path.is_socket()]) == 2
        await scene.post("/do/core-dies")
        await scene.until("ready", restarts=1)
        assert len([path for path in folder.iterdir() if path.is_socket()]) == 2
        await scene.supervisor.stop()
        assert not folder.exists()


async def test_13_its_folder_is_private_and_its_key_in_no_command_line(tmp_path: Path) -> None:
    async with stage(tmp_path) as scene:
        await scene.supervisor.start()
        await scene.supervisor.wait_ready(20)
        key = (scene.socket.parent / "key").read_text()
        assert len(key) >= 32 and scene.socket.parent.stat().st_mode & 0o777 == 0o700
        assert not any(key.encode() in _command(pid) for pid in scene.members())
        assert (await scene.post("/v1/completions", "wrong")).status_code == 401
        target = scene.state.snapshot.target(NAME)
        assert target is not None
        door = LocalTransport()
        response = await door.open(target, "/completions", b"{}", permit=None)
        assert response.status_code == 200
        await response.aread()
        await door.aclose()


async def test_14_the_real_cause_is_told_and_not_that_there_was_one(tmp_path: Path) -> None:
    async with stage(tmp_path, placement("root-cause")) as scene:
        await scene.supervisor.start()
        await scene.until("failed")
        assert "SafetensorError: Error while deserializing header" in scene.view.reason


async def test_15_an_option_that_it_does_not_know_is_not_tried_again(tmp_path: Path) -> None:
    async with stage(tmp_path, placement("bad-option")) as scene:
        await scene.supervisor.start()
        with pytest.raises(EngineFailed, match="code 2: unrecognized arguments: --disable-log-requests"):
            await scene.supervisor.wait_ready(20)
        assert len(scene.launcher.children) == 1


async def test_where_memory_is_short_it_is_started_again_with_less(tmp_path: Path) -> None:
    async with stage(tmp_path, placement("short-of-memory", context_tokens=8192)) as scene:
        await scene.supervisor.start()
        await scene.until("ready", restarts=1)
        target = scene.state.snapshot.target(NAME)
        assert target is not None and target.context_tokens == 2048
        assert any(warning.code == "engine_shrunk" for warning in scene.state.snapshot.warnings)


async def test_engines_come_and_go_while_others_run(tmp_path: Path) -> None:
    async with stage(tmp_path) as scene:
        await scene.supervisor.start()
        await scene.supervisor.wait_ready(20)
        first = scene.leader
        second = scene.supervisor.add(placement(model="n"))
        await second.wait_for(lambda life: life.phase == "ready")
        assert {target.name for target in scene.state.snapshot.targets} == {NAME, "onsite/n"}
        with pytest.raises(EngineFailed, match="n is served already"):
            scene.supervisor.add(placement(model="n"))
        with pytest.raises(EngineFailed, match="encoder, which cannot be launched here"):
            scene.supervisor.add(replace(placement(model="o"), engine="encoder"))
        await scene.supervisor.remove("n")
        assert [target.name for target in scene.state.snapshot.targets] == [NAME]
        assert is_running(first) and not is_running(scene.leader)


async def test_a_model_that_rests_gives_everything_back_and_comes_again(tmp_path: Path) -> None:
    async with stage(tmp_path) as scene:
        await scene.supervisor.start()
        await scene.supervisor.wait_ready(20)
        (engine,) = scene.supervisor.engines
        await engine.unload("not used for 300 s")
        assert (scene.view.state, scene.view.reason) == ("stopped", "not used for 300 s")
        assert scene.members() == []
        await engine.wake()
        await scene.until("ready")


async def test_a_model_on_a_gpu_sleeps_instead_and_keeps_its_process(tmp_path: Path) -> None:
    on_gpu = replace(placement(), gpu=GpuShare(("GPU-1",), 0.5, 1 << 30, 2048))
    on_gpu = replace(on_gpu, settings=(*on_gpu.settings, ("--enable-sleep-mode", "")))
    async with stage(tmp_path, on_gpu, stall_seconds=0.5) as scene:
        await scene.supervisor.start()
        await scene.supervisor.wait_ready(20)
        (engine,) = scene.supervisor.engines
        before = scene.members()
        await engine.unload("not used for 300 s")
        assert (scene.view.state, scene.view.reason) == ("stopped", "not used for 300 s")
        await eventually(lambda: time.monotonic() - scene.view.seen < 0.2, "its next view")
        assert scene.view.state == "stopped" and scene.members() == before
        await engine.wake()
        await scene.until("ready")
        assert scene.members() == before and scene.view.restarts == 0
        asked = ["/sleep?level=1", "/wake_up"]  # what the program says arrives when it likes
        await eventually(
            lambda: [line for line in scene.launcher.children[-1].last_lines() if line.startswith("/")] == asked, "both"
        )


async def test_a_probe_that_is_refused_is_no_sign_of_a_hang(tmp_path: Path) -> None:
    async with stage(tmp_path, stall_seconds=0.4) as scene:
        (engine,) = scene.supervisor.engines
        engine.process.key = "wrong"
        await scene.supervisor.start()
        await scene.supervisor.wait_ready(20)
        engine.process.key = "another"
        await eventually(lambda: engine.monitor is not None and not engine.monitor.sends_probes, "a refusal")
        await asyncio.sleep(1.0)  # longer than a hang takes to be noticed
        assert scene.view.state == "ready" and scene.view.restarts == 0
