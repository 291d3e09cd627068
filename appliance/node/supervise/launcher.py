"""Starts engines as child processes that cannot outlive this one, and keeps what they write."""

import asyncio
import logging
import logging.handlers
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

import appliance

_PASSED_ON: Final = frozenset(
    (
        "PATH",
        "HOME",
        "USER",
        "LANG",
        "LC_ALL",
        "LC_CTYPE",
        "TZ",
        "TMPDIR",
        "LD_LIBRARY_PATH",
        "DYLD_LIBRARY_PATH",
        "VIRTUAL_ENV",
        "XDG_CACHE_HOME",
        "XDG_RUNTIME_DIR",
        "CUDA_VISIBLE_DEVICES",
        "CUDA_HOME",
        "NVIDIA_VISIBLE_DEVICES",
        "HF_HOME",
    )
)
"""All that an engine sees of this process's environment. It must not see the keys of hosted providers."""

_KEPT_LINES: Final = 800
"""Enough for the tracebacks of all of an engine's processes: the first of them tells the cause."""
_KEPT_LINE_CHARACTERS: Final = 2000
_LOG_BYTES: Final = 5_000_000
_LOG_FILES: Final = 3


class Process(Protocol):
    """One running engine, with everything it has started."""

    @property
    def pid(self) -> int: ...

    async def wait(self) -> int:
        """The exit code (below 0: a signal, negated), once it and its whole group are gone."""

    def terminate(self) -> None:
        """Ask it to end; its group is killed once it has."""

    def kill(self) -> None:
        """End the whole group."""

    def last_lines(self) -> Sequence[str]:
        """The last lines it wrote, oldest first."""


class Launcher(Protocol):
    """Starts a program from a command line: as a child process here, on another machine elsewhere."""

    async def launch(self, name: str, argv: Callable[[int], Sequence[str]], environment: Mapping[str, str]) -> Process:
        """Start `argv(parent_guard_fd)`. Raises OSError when that cannot be done."""


class ChildLauncher:
    """Child processes in sessions of their own, guarded by a pipe of which only this process holds the write end."""

    def __init__(self, logs_folder: Path) -> None:
        self._logs_folder = logs_folder

    async def launch(self, name: str, argv: Callable[[int], Sequence[str]], environment: Mapping[str, str]) -> "Child":
        """Start `argv(parent_guard_fd)`; what it writes goes to `logs_folder/NAME.log`. Raises OSError."""
        guard_read, guard_write = os.pipe()
        output_read, output_write = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *argv(guard_read),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output_write,
                stderr=output_write,
                env=build_engine_environment(os.environ, environment),
                pass_fds=(guard_read,),
                start_new_session=True,
            )
        except BaseException:
            os.close(guard_write)
            os.close(output_read)
            raise
        finally:
            os.close(guard_read)
            os.close(output_write)
        return Child(process, guard_write, EngineOutput(output_read, self._logs_folder / f"{name}.log"))


def build_engine_environment(own: Mapping[str, str], added: Mapping[str, str]) -> dict[str, str]:
    """What an engine gets to see: a short list of our own variables, ours to be imported from, and `added`."""
    passed = {name: value for name, value in own.items() if name in _PASSED_ON}
    package_folder = str(Path(appliance.__file__).resolve().parent.parent)
    paths = [package_folder, *filter(None, own.get("PYTHONPATH", "").split(os.pathsep))]
    # Unbuffered: the last line before a sudden death is the one that tells why.
    return passed | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"} | dict(added)


class Child:
    """One child process and its group."""

    def __init__(self, process: asyncio.subprocess.Process, guard_write: int, output: "EngineOutput") -> None:
        self._process, self._guard_write, self._output = process, guard_write, output
        self._is_gone = False

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """The exit code, once the leader has ended and what was left of its group has been killed."""
        code = await self._process.wait()
        if not self._is_gone:
            self.kill()
            self._is_gone = True  # from here on the number may belong to another program
            os.close(self._guard_write)
        await self._output.wait_for_end()
        return code

    def terminate(self) -> None:
        # The leader alone: an engine's other processes must work on until it has answered what it was asked.
        self._signal(os.kill, signal.SIGTERM)

    def kill(self) -> None:
        # The group has the leader's number and keeps it while any member lives.
        self._signal(os.killpg, signal.SIGKILL)

    def _signal(self, send: Callable[[int, int], None], number: signal.Signals) -> None:
        if self._is_gone:
            return
        try:
            send(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            return  # no process is left; macOS says EPERM for zombies

    def last_lines(self) -> Sequence[str]:
        return self._output.last_lines()


class EngineOutput:
    """What an engine writes: the last lines in memory, all of it in a file that is rotated.

    Read by a thread of its own, so that a flood of lines or a slow disk never holds up the event loop.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._fd, self._path = fd, path
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, name=f"log {path.stem}", daemon=True).start()

    def last_lines(self) -> Sequence[str]:
        """The last lines, oldest first."""
        return tuple(self._lines)

    async def wait_for_end(self, timeout_seconds: float = 0.3) -> None:
        """Wait until everything written has been read. A process that left the group may hold the pipe open, hence
        the limit."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._ended.wait()
        except TimeoutError:
            return

    def _read(self) -> None:
        file = self._open_log()
        # Universal newlines: progress bars end their lines with a carriage return.
        with open(self._fd, encoding="utf-8", errors="replace", newline=None) as stream:
            while line := stream.readline(_KEPT_LINE_CHARACTERS):
                text = line.rstrip()
                if not text:
                    continue
                self._lines.append(text)
                if file is not None:
                    file.emit(logging.LogRecord("engine", logging.INFO, "", 0, text, None, None))
        if file is not None:
            file.close()
        try:
            self._loop.call_soon_threadsafe(self._ended.set)
        except RuntimeError:
            return  # the loop has been closed meanwhile

    def _open_log(self) -> logging.Handler | None:
        """The log file, or None if none can be written: an engine is not to fail for its log."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = _LogFile(self._path, maxBytes=_LOG_BYTES, backupCount=_LOG_FILES - 1, encoding="utf-8")
        except OSError as error:
            self._lines.append(f"(no log file: {error})")
            return None
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        return file


class _LogFile(logging.handlers.RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk loses lines, silently: printing a traceback for each would be worse."""
        del record
