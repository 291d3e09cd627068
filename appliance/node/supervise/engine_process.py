"""The operating system's side of one engine: its folder, its socket, its process and what that leaves behind."""

import asyncio
import secrets
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog

from appliance.engines.base import EngineAdapter, Placement
from appliance.node.supervise import orphans
from appliance.node.supervise.engine_client import EngineClient
from appliance.node.supervise.launcher import Launcher, Process
from appliance.node.supervise.sockets import SESSION_FILE

KEY_FILE: Final = "key"

_log = structlog.get_logger(__name__)


class EngineProcess:
    """Starts one engine, names its processes, and removes what is left when it has ended."""

    def __init__(self, engine: EngineAdapter, model: str, folder: Path, launcher: Launcher, home: Path) -> None:
        """`folder` is this engine's alone and is made at each start. `home` marks the processes of this node."""
        self.socket = folder / "s"
        self.key = secrets.token_urlsafe(24) if engine.key_variable else ""
        """What the engine asks of its callers; empty when it asks for none."""
        self._engine, self._model, self._folder, self._launcher = engine, model, folder, launcher
        self._mark = orphans.format_engine_mark(home, model)
        self._session: int | None = None
        """Of the process that was started last: its leader's number."""

    async def start(self, placement: Placement, drain_seconds: float) -> Process:
        """Start the program that serves `placement`. Raises OSError when that cannot be done."""
        # Engines leave their sockets behind, and some refuse to start when one lies there.
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(mode=0o700, parents=True)
        (self._folder / KEY_FILE).write_text(self.key)

        def build_argv(parent_guard_fd: int) -> list[str]:
            return self._engine.build_argv(
                sys.executable,
                placement,
                socket=self.socket,
                parent_guard_fd=parent_guard_fd,
                drain_seconds=drain_seconds,
            )

        return await self._launcher.launch(self._model, build_argv, self._environment(placement))

    def record_session(self, pid: int) -> None:
        """Remember, on disk too, the session of a process that was started. Raises OSError."""
        self._session = pid
        (self._folder / SESSION_FILE).write_text(str(pid))

    def connect(self) -> EngineClient:
        """A client of the engine's socket. The caller closes it."""
        return EngineClient(self.socket, self.key)

    def list_processes(self) -> Sequence[int]:
        """All its processes, wherever they are. Looks through all of the machine's: call it in a thread."""
        return orphans.find_marked_processes(self._mark, self._session)

    async def clean_up(self, shared_memory: frozenset[Path]) -> None:
        """End processes that have left its group, and remove its folder and its files of shared memory."""
        ended = await asyncio.to_thread(lambda: orphans.kill_processes(self.list_processes()))
        if ended:
            _log.warning("an engine left processes behind; they were ended", model=self._model, pids=ended)
        await asyncio.to_thread(orphans.remove_shared_memory, shared_memory)
        self.remove_folder()

    def remove_folder(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _environment(self, placement: Placement) -> dict[str, str]:
        added = dict(self._engine.build_environment(placement, self._folder))
        if self._engine.key_variable:
            added[self._engine.key_variable] = self.key
        return added | {orphans.ENGINE_MARK_VARIABLE: self._mark}
