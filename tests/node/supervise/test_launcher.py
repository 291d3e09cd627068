"""Real processes: started, listened to, ended with everything they have started."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import uvloop

from appliance.node.supervise.launcher import ChildLauncher, build_engine_environment
from tests.node.processes import eventually, group_members, is_running

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).resolve().parents[3]
FORKS = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


async def test_a_child_leads_a_group_of_its_own_and_its_exit_code_comes_back(tmp_path: Path) -> None:
    child = await ChildLauncher(tmp_path).launch("a", lambda _: _python("import time; time.sleep(600)"), {})
    assert os.getpgid(child.pid) == child.pid == os.getsid(child.pid)
    child.terminate()
    assert await child.wait() == -signal.SIGTERM
    child.kill()  # harmless afterwards


async def test_what_a_dead_leader_has_started_is_killed(tmp_path: Path) -> None:
    child = await ChildLauncher(tmp_path).launch("a", lambda _: _python(FORKS + "sys.exit(4)"), {})
    assert await child.wait() == 4
    await eventually(lambda: group_members(child.pid) == [], "an empty group")


async def test_what_a_child_says_is_kept_and_written_down(tmp_path: Path) -> None:
    code = "import sys; print('out'); print('50%\\r100%\\r', end=''); print('a\\xff' * 3000, file=sys.stderr)"
    child = await ChildLauncher(tmp_path / "logs").launch("talker", lambda _: _python(code), {})
    await child.wait()
    assert child.last_lines()[:3] == ("out", "50%", "100%")
    assert max(map(len, child.last_lines())) <= 2000
    assert " out\n" in (tmp_path / "logs/talker.log").read_text()


async def test_a_flood_is_cut_to_the_last_lines_and_the_log_is_rotated(tmp_path: Path) -> None:
    code = "for n in range(60_000): print(f'{n:>100}')"
    child = await ChildLauncher(tmp_path).launch("flood", lambda _: _python(code), {})
    await child.wait()
    await eventually(lambda: bool(child.last_lines()) and child.last_lines()[-1].endswith("59999"), "the last line")
    assert len(child.last_lines()) == 800
    assert (tmp_path / "flood.log.1").stat().st_size <= 5_000_000


async def test_a_log_that_cannot_be_written_does_not_hinder_the_engine(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    child = await ChildLauncher(tmp_path / "logs").launch("a", lambda _: _python("print('hello')"), {})
    assert await child.wait() == 0
    assert child.last_lines()[-1] == "hello"


async def test_no_secret_reaches_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("DATABASE_PASSWORD", "secret")
    code = "import os; print(sorted(os.environ))"
    child = await ChildLauncher(tmp_path).launch("a", lambda _: _python(code), {"OMP_WAIT_POLICY": "PASSIVE"})
    await child.wait()
    (line,) = child.last_lines()
    assert "KEY" not in line and "PASSWORD" not in line
    assert "'OMP_WAIT_POLICY'" in line and "'PATH'" in line


def test_the_engine_can_import_what_the_node_was_imported_from() -> None:
    environment = build_engine_environment({"PYTHONPATH": "/elsewhere", "SECRET": "x"}, {})
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/elsewhere"]
    assert "SECRET" not in environment


async def test_a_program_that_does_not_exist_is_an_error_and_leaks_nothing(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        await ChildLauncher(tmp_path).launch("a", lambda _: ["/no/such/program"], {})
    assert len(os.listdir("/proc/self/fd")) == before


async def test_descriptors_are_given_back(tmp_path: Path) -> None:
    launcher = ChildLauncher(tmp_path)
    await (await launcher.launch("a", lambda _: _python(""), {})).wait()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        await (await launcher.launch("a", lambda _: _python(""), {})).wait()
    await eventually(lambda: len(os.listdir("/proc/self/fd")) <= before, "closed descriptors")


def test_it_works_on_uvloop_as_well(tmp_path: Path) -> None:
    async def scene() -> int:
        child = await ChildLauncher(tmp_path).launch("a", lambda fd: _python(f"import os; os.read({fd}, 1)"), {})
        assert os.getsid(child.pid) == child.pid
        child.terminate()
        return await child.wait()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(scene()) == -signal.SIGTERM


# The parent guard: whatever dies, nothing stays behind.

PARENT = """
import asyncio, sys
from pathlib import Path
from appliance.node.supervise.launcher import ChildLauncher

async def main():
    guarded = [sys.executable, "-m", "appliance.node.supervise.parent_guard", "--fd"]
    program = [sys.executable, "-c", {program!r}]
    child = await ChildLauncher(Path({logs!r})).launch("a", lambda fd: [*guarded, str(fd), "--", *program], {{}})
    print(child.pid, flush=True)
    await child.wait()

asyncio.run(main())
"""
STUBBORN = (
    "import signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print('up', flush=True)\n"
    "time.sleep(600)"
)


def _parent(code: str) -> tuple["subprocess.Popen[str]", int]:
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    with parent.stdout:
        return parent, int(parent.stdout.readline())


async def _guarded_family(tmp_path: Path) -> tuple["subprocess.Popen[str]", int]:
    """A parent like the router, with a program under the guard that ignores SIGTERM and has a child of its own."""
    parent, leader = _parent(PARENT.format(program=STUBBORN, logs=str(tmp_path)))
    log = tmp_path / "a.log"
    await eventually(lambda: log.exists() and "up" in log.read_text(), "the program")
    await eventually(lambda: len(group_members(leader)) == 3, "guard, program and its child")
    return parent, leader


async def test_kill_nine_of_the_parent_leaves_nobody_behind(tmp_path: Path) -> None:
    parent, leader = await _guarded_family(tmp_path)
    parent.kill()
    parent.wait()
    await eventually(lambda: group_members(leader) == [], "an empty group")


async def test_kill_nine_of_the_guard_itself_leaves_nobody_behind(tmp_path: Path) -> None:
    parent, leader = await _guarded_family(tmp_path)
    os.kill(leader, signal.SIGKILL)
    await eventually(lambda: group_members(leader) == [], "an empty group")
    parent.wait()


async def test_a_stopped_program_dies_with_the_parent_too(tmp_path: Path) -> None:
    parent, leader = await _guarded_family(tmp_path)
    for pid in group_members(leader):
        if pid != leader:
            os.kill(pid, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    await eventually(lambda: group_members(leader) == [], "an empty group")


@pytest.mark.parametrize(
    ("code", "expected"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 15)", -15), ("", 0)]
)
async def test_the_guard_ends_as_its_program_does(tmp_path: Path, code: str, expected: int) -> None:
    guard = [sys.executable, "-m", "appliance.node.supervise.parent_guard", "--fd"]
    child = await ChildLauncher(tmp_path).launch("a", lambda fd: [*guard, str(fd), "--", *_python(code)], {})
    assert await child.wait() == expected


async def test_sigterm_reaches_the_program_through_the_guard(tmp_path: Path) -> None:
    guard = [sys.executable, "-m", "appliance.node.supervise.parent_guard", "--fd"]
    code = "import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); print('up', flush=True); signal.pause()"
    child = await ChildLauncher(tmp_path).launch("a", lambda fd: [*guard, str(fd), "--", *_python(code)], {})
    await eventually(lambda: "up" in child.last_lines(), "the program")
    child.terminate()
    assert await child.wait() == 7
    assert not is_running(child.pid)


async def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    guard = [sys.executable, "-m", "appliance.node.supervise.parent_guard", "--fd"]
    child = await ChildLauncher(tmp_path).launch("a", lambda fd: [*guard, str(fd), "--", "/no/such/program"], {})
    assert await child.wait() == 127
    assert child.last_lines()[-1] == "/no/such/program: No such file or directory"
