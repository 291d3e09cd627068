"""A program that behaves as an engine does towards its supervisor, and misbehaves when told to.

    python fake_engine.py --uds SOCKET [--parent-guard-fd N] [--mode MODE] [--counter FILE]

MODE: serve · never-ready · crash-once (only the first start, counted in FILE) · exit:CODE · ignore-sigterm
POST /do/crash, /do/hang (work waits, no steps), /do/freeze (stops altogether), /do/work (steps go on), /do/fork.
"""

# ruff: noqa: T201  what an engine prints is what the supervisor reads
import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

LOAD = {
    "queued_requests": 0,
    "running_sequences": 0,
    "sequences_capacity": 4,
    "queued_prompt_tokens": 0,
    "remaining_output_tokens": 0,
    "kv_used_tokens": 0,
    "kv_cached_tokens": 0,
    "kv_capacity_tokens": 1024,
    "steps": 0,
    "prefill_tokens_total": 0,
    "decode_tokens_total": 0,
    "prefill_tokens_per_second": 100.0,
    "decode_tokens_per_second": {"1": 10.0},
}


class FakeEngine:
    def __init__(self, mode: str, abilities: str | None = None) -> None:
        self.mode = mode
        self.abilities = abilities
        self.behaviour = "idle"
        self.steps = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            method, path, _ = head.decode().split(" ", 2)
            status, body = self.reply(method, path)
            content = json.dumps(body).encode()
            writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(content), content))
            await writer.drain()

    def reply(self, method: str, path: str) -> tuple[int, object]:
        if path == "/health":
            return (503 if self.mode == "never-ready" else 200), {}
        if path == "/v1/models":
            meta = {} if self.abilities is None else {"abilities": self.abilities.split()}
            return 200, {"data": [{"meta": meta}]}
        if path == "/load":
            self.steps += self.behaviour == "work"
            waiting = int(self.behaviour in ("work", "hang"))
            return 200, {**LOAD, "queued_requests": waiting, "steps": self.steps}
        assert method == "POST"
        self.behaviour = path.removeprefix("/do/")
        if self.behaviour == "crash":
            print("out of luck", flush=True)
            os._exit(1)
        if self.behaviour == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.behaviour == "fork":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            return 200, {"pid": child.pid}
        return 200, {}


async def serve(engine: FakeEngine, socket: str) -> None:
    server = await asyncio.start_unix_server(engine.answer, socket)
    loop = asyncio.get_running_loop()
    if engine.mode == "ignore-sigterm":
        loop.add_signal_handler(signal.SIGTERM, lambda: print("not now", flush=True))
    else:
        loop.add_signal_handler(signal.SIGTERM, lambda: os._exit(0))
    async with server:
        await server.serve_forever()


def watch_parent(fd: int) -> None:
    while os.read(fd, 64):
        pass
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--uds", required=True)
    parser.add_argument("--parent-guard-fd", type=int)
    parser.add_argument("--mode", default="serve")
    parser.add_argument("--counter", type=Path)
    parser.add_argument("--abilities", help="what it says that its model can do; default: nothing at all")
    options = parser.parse_args()
    print(f"fake engine in mode {options.mode}", flush=True)
    if options.parent_guard_fd is not None:
        threading.Thread(target=watch_parent, args=(options.parent_guard_fd,), daemon=True).start()
    if options.mode.startswith("exit:"):
        print("cannot go on", flush=True)
        sys.exit(int(options.mode.partition(":")[2]))
    if options.mode == "crash-once":
        starts = options.counter.read_text() if options.counter.exists() else ""
        options.counter.write_text(starts + "x")
        if not starts:
            sys.exit(1)
    asyncio.run(serve(FakeEngine(options.mode, options.abilities), options.uds))


if __name__ == "__main__":
    main()
