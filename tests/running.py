"""Real processes for end-to-end tests and benchmarks: a node as a user would start it."""

import contextlib
import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_URL = re.compile(r"https?://[\w.:\[\]-]+:\d+")


@dataclass(frozen=True)
class RunningNode:
    url: str
    process: "subprocess.Popen[str]"
    data_dir: Path
    ready_text: str
    """Everything the node printed until it said that it was ready."""
    seconds_to_ready: float

    def engine_pids(self) -> list[int]:
        """The engine processes that are this node's children."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if "appliance.llamacpp" in _command_line(int(pid))]

    def stop(self, seconds: float = 30.0) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


@contextlib.contextmanager
def running_node(
    data_dir: Path,
    *,
    config: str = "",
    policy: str | None = None,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    seconds: float = 60.0,
    calibrate: bool = False,
    within: Sequence[str] = (),
) -> Iterator[RunningNode]:
    """Start `appliance serve` on a free port, wait until it says it is ready, stop it at the end.

    A first start measures nothing unless told to `calibrate`: tests need the same node every time, and soon. `within`
    is a command that becomes the one given to it, such as `ip netns exec NAME`.
    Raises RuntimeError with what it printed when it ends or stays silent for longer than `seconds`.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    config_path = data_dir / "appliance.toml"
    if policy is not None:
        (data_dir / "policy.toml").write_text(policy)
        config = f"policy = {str(data_dir / 'policy.toml')!r}\n".replace("'", '"') + config
    config_path.write_text(config)
    command = [*within, sys.executable, "-m", "appliance", "serve", "--port", "0"]
    command += ["--config", str(config_path), "--data-dir", str(data_dir), *arguments]
    command += [] if calibrate else ["--no-calibrate"]
    started = time.monotonic()
    with (data_dir / "node.log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **(environment or {})},
            preexec_fn=_dies_with_us,
        )
    try:
        text = _read_until_ready(process, started + seconds, data_dir / "node.log")
        url = _URL.search(text)
        assert url is not None
        yield RunningNode(url[0], process, data_dir, text, time.monotonic() - started)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _dies_with_us() -> None:
    """A node whose test or benchmark was killed ends, too, and drains. Linux alone can (PR_SET_PDEATHSIG is 1)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _read_until_ready(process: "subprocess.Popen[str]", deadline: float, log: Path) -> str:
    """What the node prints up to and including the line that ends its ready message."""
    assert process.stdout is not None
    text = ""
    while "\nStop it with" not in text:
        waiting = deadline - time.monotonic()
        if waiting <= 0 or not select.select([process.stdout], [], [], waiting)[0]:
            raise RuntimeError(
                f"the node is not ready in time; it printed {text!r}; its log: {log.read_text()[-3000:]}"
            )
        piece = os.read(process.stdout.fileno(), 65_536).decode()
        if not piece:
            raise RuntimeError(
                f"the node ended ({process.wait()}); it printed {text!r}; its log: {log.read_text()[-3000:]}"
            )
        text += piece
    return text
