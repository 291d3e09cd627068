"""A program that behaves as `vllm serve` was seen to, its bad manners included, as far as its supervisor can tell.

    python fake_vllm.py serve MODEL --uds SOCKET [vLLM's options] [--fake MANNER]

Like vLLM it is a front end with an engine core as a child in the same group; binds its socket long before it listens;
never removes it; says 200 on /health whatever the core does; and exits with 0 when the core dies. MANNER:

    well · slow-start (listens after 2 s, SIGTERM before is lost) · short-of-memory · root-cause · bad-option
    escaping-core (the core leaves the group)

POST /do/hang stops the core as SIGSTOP does; POST /do/core-dies kills it.
"""

# ruff: noqa: T201, ASYNC110  what an engine prints is what the supervisor reads; a process has no event to wait for
import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

CORE = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
CAUSES = {
    "short-of-memory": [
        "(Worker pid=7) ERROR 11-20 08:15:50 [multiproc_executor.py:9] Traceback (most recent call last):",
        "(Worker pid=7) ERROR 11-20 08:15:50 [multiproc_executor.py:9] ValueError: To serve at least one request with "
        "the model's max seq len (8192), (0.18 GiB KV cache is needed, which is larger than the available KV cache "
        "memory (0.05 GiB). Based on the available memory, the estimated maximum model length is 2048.",
    ],
    "root-cause": [
        "(EngineCore pid=7) ERROR 11-20 08:15:50 [core.py:9] Traceback (most recent call last):",
        "(EngineCore pid=7) ERROR 11-20 08:15:50 [core.py:9] safetensors.SafetensorError: Error while deserializing "
        "header: incomplete metadata, file not fully covered",
    ],
}
PAGE = """\
vllm:num_requests_running{{engine="0",model_name="m"}} {running}
vllm:num_requests_waiting{{engine="0",model_name="m"}} 0.0
vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} 0.0
vllm:prompt_tokens_total{{engine="0",model_name="m"}} {steps}
vllm:generation_tokens_total{{engine="0",model_name="m"}} {steps}
vllm:iteration_tokens_total_count{{engine="0",model_name="m"}} {steps}
vllm:cache_config_info{{engine="0",kv_cache_size_tokens="93184",block_size="128"}} 1.0
"""


class Fake:
    def __init__(self, core: "subprocess.Popen[bytes]", key: str, drain_seconds: float) -> None:
        self.core, self.key, self.drain_seconds = core, key, drain_seconds
        self.steps = 0
        self.running = 0
        self.hangs = False
        self.draining = False

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                length = next((int(line[15:]) for line in head.splitlines() if line.lower().startswith("content-l")), 0)
                await reader.readexactly(length)
                status, body = await self.reply(head)
                content = body.encode()
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(content), content))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def reply(self, head: str) -> tuple[int, str]:
        path = head.split(" ", 2)[1]
        if path.startswith("/v1/") and f"Bearer {self.key}" not in head:
            return 401, '{"error":"Unauthorized"}'
        if path == "/metrics":
            return 200, PAGE.format(steps=float(self.steps), running=float(0 if self.hangs else self.running))
        if path == "/do/hang":
            self.hangs = True
            os.kill(self.core.pid, signal.SIGSTOP)
        if path == "/do/core-dies":
            self.core.kill()
        if path in ("/sleep?level=1", "/wake_up"):
            if os.environ.get("VLLM_SERVER_DEV_MODE") != "1":
                return 404, '{"detail":"Not Found"}'
            print(path, flush=True)
        if path.startswith("/v1/"):
            return await self.complete(path)
        return 200, ""

    async def complete(self, path: str) -> tuple[int, str]:
        if self.draining:
            return 500, '{"error":{"message":"cannot schedule new futures after shutdown","code":500}}'
        self.running += 1
        if path == "/v1/slow":
            await asyncio.sleep(0.5)
        while self.hangs:
            await asyncio.sleep(0.05)
        self.running -= 1
        self.steps += 1
        return 200, "{}"

    async def watch_core(self) -> None:
        """Ends with 0 when the core has died, as vLLM does."""
        while self.core.poll() is None:
            await asyncio.sleep(0.02)
        print("(APIServer pid=1) ERROR 11-20 08:15:50 [launcher.py:9] Engine core proc died unexpectedly", flush=True)
        os._exit(0)

    async def drain(self) -> None:
        """What is under way is finished, within the time for it; without any time callers are left hanging."""
        self.draining = True
        until = time.monotonic() + self.drain_seconds
        while self.running and (self.drain_seconds == 0 or time.monotonic() < until):
            await asyncio.sleep(0.02)
        self.core.kill()
        os._exit(0)


async def serve(fake: Fake, listener: socket.socket) -> None:
    server = await asyncio.start_unix_server(fake.answer, sock=listener)
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(fake.watch_core())]
    loop.add_signal_handler(signal.SIGTERM, lambda: tasks.append(loop.create_task(fake.drain())))
    print("(APIServer pid=1) INFO 11-20 08:16:02 [entry.py:140] Application startup complete.", flush=True)
    async with server:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(prog="vllm serve", allow_abbrev=False)
    parser.add_argument("command")
    parser.add_argument("model")
    parser.add_argument("--uds", required=True)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--shutdown-timeout", type=float, default=0.0)
    parser.add_argument("--fake", default="well")
    options, rest = parser.parse_known_args()
    if options.fake == "bad-option":
        parser.error("unrecognized arguments: --disable-log-requests")
    if rest and "PYTHONPATH" in os.environ:
        sys.exit("its environment leads to packages that are not its own")
    print("(APIServer pid=1) INFO 11-20 08:15:07 [model.py:733] Resolved architecture: LlamaForCausalLM", flush=True)
    if options.fake == "root-cause" or (options.fake == "short-of-memory" and options.max_model_len > 2048):
        print("\n".join(CAUSES[options.fake]))
        sys.exit("RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(options.uds)  # a stale file: OSError: [Errno 98] Address already in use
    left_behind = Path(os.environ["VLLM_RPC_BASE_PATH"]) / str(uuid.uuid4())
    socket.socket(socket.AF_UNIX).bind(str(left_behind))
    core = subprocess.Popen([sys.executable, "-c", CORE], start_new_session=options.fake == "escaping-core")
    if options.fake == "slow-start":
        signal.signal(signal.SIGTERM, lambda *_: None)
        print("Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:01<00:01, 1.6s/it]", flush=True)
        until = time.monotonic() + 2
        while time.monotonic() < until:
            time.sleep(0.05)
    asyncio.run(serve(Fake(core, os.environ["VLLM_API_KEY"], options.shutdown_timeout), listener))


if __name__ == "__main__":
    main()
