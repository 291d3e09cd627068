"""Two network namespaces with one cable between them: whatever leaves the first one goes through it, and is counted."""

import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest

HERE, THERE = "10.77.0.1", "10.77.0.2"
_CLONE_NEWNET = 0x40000000

Result = TypeVar("Result")


@dataclass(frozen=True)
class Cable:
    """`inside` is the namespace of the node, `outside` that of everybody else."""

    inside: str
    outside: str

    def packets_out(self) -> int:
        """Packets that have left the inside, of any kind: there is no address resolution and no IPv6 to make noise."""
        rows = json.loads(_ip("-n", self.inside, "-s", "-j", "link", "show", "dev", "cable"))
        return int(rows[0]["stats64"]["tx"]["packets"])

    def within(self, name: str) -> list[str]:
        """What to put before a command so that it runs in that namespace."""
        return ["ip", "netns", "exec", name]


@contextlib.contextmanager
def cable() -> Iterator[Cable]:
    """Skips the test where this machine does not allow it, saying why."""
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2: install it (Debian, Ubuntu: apt-get install iproute2)")
    if os.geteuid() != 0:
        pytest.skip("needs root, to make network namespaces")
    made = Cable(f"appliance-in-{os.getpid()}", f"appliance-out-{os.getpid()}")
    try:
        try:
            _connect(made)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"cannot make network namespaces here: {error.stderr.strip()}")
        yield made
    finally:
        for name in (made.inside, made.outside):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _connect(made: Cable) -> None:
    for name in (made.inside, made.outside):
        _ip("netns", "add", name)
        _run(
            *made.within(name),
            "sysctl",
            "-qw",
            "net.ipv6.conf.all.disable_ipv6=1",
            "net.ipv6.conf.default.disable_ipv6=1",
        )
        _ip("-n", name, "link", "set", "lo", "up")
    _ip("link", "add", "cable", "netns", made.inside, "type", "veth", "peer", "name", "cable", "netns", made.outside)
    ends = ((made.inside, HERE, made.outside, THERE), (made.outside, THERE, made.inside, HERE))
    for name, own, _, _ in ends:
        _ip("-n", name, "address", "add", f"{own}/24", "dev", "cable")
        _ip("-n", name, "link", "set", "cable", "up")
    for name, _, other, address in ends:
        neighbour = json.loads(_ip("-n", other, "-j", "link", "show", "dev", "cable"))[0]["address"]
        _ip("-n", name, "neighbour", "replace", address, "lladdr", neighbour, "dev", "cable", "nud", "permanent")
    # Everything that is not on this machine, name servers included, would have to go through the cable.
    _ip("-n", made.inside, "route", "add", "default", "via", THERE, "dev", "cable")


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def run_in(namespace: str, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Run `work` on an event loop of its own in a thread that is in `namespace`; its sockets are of there."""
    libc = ctypes.CDLL(None, use_errno=True)
    results: list[Result] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            handle = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
            try:
                if libc.setns(handle, _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
            finally:
                os.close(handle)
            results.append(asyncio.run(work()))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
