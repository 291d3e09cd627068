"""Ends a program when its parent does: `python -m appliance.node.supervise.parent_guard --fd N -- PROGRAM ARGUMENT...`

Whoever starts the program keeps the write end of a pipe and gives its read end as N. When the last write end closes,
for whatever reason, everything in this process's group is killed. SIGTERM goes on to the program, and to it alone: its
own children end when it says so. The program's exit code becomes this one's.
"""

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_NOT_FOUND: Final = 127


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="parent_guard", description="Run a program that ends when a pipe does.")
    parser.add_argument("--fd", type=int, required=True, help="read end of the pipe")
    parser.add_argument("program", nargs="+", help="the program and its arguments, after --")
    parser.add_argument("--path", default="", help="a folder that the program is to look into first for programs")
    parser.add_argument("--without", action="append", default=[], help="a variable that the program is not to see")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _remember)
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    try:
        environment = _environment(options.path, options.without)
        child = subprocess.Popen(options.program, preexec_fn=lambda: _become_program(libc), env=environment)
    except OSError as error:
        print(f"{options.program[0]}: {error.strerror}", file=sys.stderr)  # noqa: T201
        return _NOT_FOUND
    threading.Thread(target=_kill_group_at_end_of, args=(options.fd,), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGTERM))
    if _asked:
        child.terminate()
    code = child.wait()
    if code < 0:
        # Say the same as the program did: by the signal itself where it can be had.
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    return code


_asked: list[int] = []
"""Signals that came before there was a program to pass them on to."""


def _remember(number: int, frame: object) -> None:
    del frame
    _asked.append(number)


def _environment(path: str, without: Sequence[str]) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in without}
    if path:
        environment["PATH"] = os.pathsep.join(filter(None, (path, environment.get("PATH"))))
    return environment


def _become_program(libc: ctypes.CDLL | None) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if libc is not None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill_group_at_end_of(fd: int) -> None:
    while os.read(fd, 64):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
