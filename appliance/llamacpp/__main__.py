"""The CPU engine as a program: read the arguments, open the socket, load, serve, drain, say how it ended.

Exit codes: 0 clean, 2 bad arguments, 3 the model file is missing or corrupt, 4 the engine failed.
"""

import argparse
import asyncio
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from appliance.errors import ModelFileError
from appliance.llamacpp.chat.prompts import PromptBuilder
from appliance.llamacpp.decode.constraints import GrammarCompiler
from appliance.llamacpp.engine import LlamaEngine
from appliance.llamacpp.kernels import PLAIN_KERNELS, Kernels, install_kernels
from appliance.llamacpp.memory_release import release_code_pages, release_freed
from appliance.llamacpp.model import LlamaModel
from appliance.llamacpp.server.http import MAX_BODY_BYTES, EngineGate, ServerContext, make_app
from appliance.llamacpp.tools.formats import SYNTAXES
from appliance.llamacpp.weights import has_packed_weights
from appliance.worker import EXIT_CLEAN, EXIT_ENGINE, EXIT_MODEL_FILE
from appliance.worker.json_log import log, log_library_warnings
from appliance.worker.server import add_worker_arguments, run_worker, serve_app

# After a failure the waiting clients get their error before the socket goes.
_ERRORS_SENT_SECONDS = 2.0

Result = TypeVar("Result")


def main(argv: Sequence[str] | None = None) -> int:
    log_library_warnings()
    return run_worker(_arguments(argv), serve)


async def serve(options: argparse.Namespace, listener: socket.socket) -> int:
    """Answer on `listener` from the first moment (503 while loading) until a signal or the engine ends it."""
    gate = EngineGate(max_body_bytes=options.max_body_bytes)
    async with serve_app(make_app(gate), listener) as stop:
        return await _live(options, gate, stop)


async def _live(options: argparse.Namespace, gate: EngineGate, stop: asyncio.Event) -> int:
    log("loading", model=str(options.model), threads=options.threads, context_tokens=options.context_tokens)
    loading = asyncio.ensure_future(_in_daemon_thread(lambda: _load(options)))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            log("stopped", reason="a signal came while loading")
            return EXIT_CLEAN
        gate.kernels, model, prompts, grammars = loading.result()
    except ModelFileError as error:
        gate.close("failed", error.message)
        log("model_file_error", reason=error.message)
        return EXIT_MODEL_FILE
    except Exception as error:  # whatever keeps the engine from starting is reported once, in one line
        gate.close("failed", str(error))
        log("engine_failed", reason=f"{type(error).__name__}: {error}")
        return EXIT_ENGINE
    finally:
        if not loading.done():
            stopping.cancel()
    try:
        return await _work(options, gate, stopping, model, prompts, grammars)
    finally:
        stopping.cancel()
        grammars.close()
        model.close()


async def _work(
    options: argparse.Namespace,
    gate: EngineGate,
    stopping: "asyncio.Task[bool]",
    model: LlamaModel,
    prompts: PromptBuilder,
    grammars: GrammarCompiler,
) -> int:
    engine = LlamaEngine(model, max_queued_requests=options.max_queued_requests)
    engine.start()
    gate.reason = "the engine measures its speed"
    failing = asyncio.create_task(engine.wait_until_failed())
    ready = asyncio.create_task(engine.wait_until_ready())
    await asyncio.wait({stopping, failing, ready}, return_when=asyncio.FIRST_COMPLETED)
    if ready.done() and ready.exception() is None:
        release_freed()
        release_code_pages()
        alias = options.alias or options.model.stem
        gate.open(ServerContext(alias, model, engine, prompts, grammars))
        log("ready", model=alias, context_tokens=model.context_tokens, sequences=model.sequences, threads=model.threads)
        await asyncio.wait({stopping, failing}, return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    failing.cancel()
    if engine.failed is not None:
        gate.close("failed", engine.failed.message)
        log("engine_failed", reason=engine.failed.message)
        await engine.close(0)
    else:
        gate.close("draining", "the engine was asked to stop")
        log("draining", requests=gate.requests.count, seconds=options.drain_seconds)
        await engine.close(options.drain_seconds)
    with suppress(TimeoutError):
        await asyncio.wait_for(gate.requests.wait_until_none(), _ERRORS_SENT_SECONDS)
    log("stopped")
    return EXIT_CLEAN if engine.failed is None else EXIT_ENGINE


def _load(options: argparse.Namespace) -> tuple[Kernels, LlamaModel, PromptBuilder, GrammarCompiler]:
    kernels = PLAIN_KERNELS if options.plain_kernels else install_kernels()
    log("kernels", kernels=kernels.summary)
    model = LlamaModel.load(
        options.model,
        threads=options.threads,
        context_tokens=options.context_tokens,
        sequences=options.sequences,
        batch_tokens=options.batch_tokens,
        slot_tokens=choose_slot_setting(options.slot_tokens, kernels),
        mapped=not (kernels.names and has_packed_weights(options.model)),
    )
    grammars = GrammarCompiler(model.vocab_pointer, model.end_tokens, vocabulary_size=model.vocabulary_size)
    template = None
    if options.chat_template is not None:
        try:
            template = options.chat_template.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFileError(f"the chat template {str(options.chat_template)!r} cannot be read: {error}") from error
    return kernels, model, PromptBuilder(model, template=template, tool_format=options.tool_format), grammars


def choose_slot_setting(asked: int | None, kernels: Kernels) -> int | None:
    """Cells of each sequence's slot; None: as many as fit.

    With an attention that looks at a query's own cells alone, slots are no quicker than the shared memory (measured
    with 8 and 32 sequences: within 1 %), where forced tokens and drafts share a step with everybody's next tokens.
    """
    return 0 if asked is None and kernels.names else asked


async def _in_daemon_thread(work: Callable[[], Result]) -> Result:
    """Unlike asyncio's own threads this one does not hold up the end of the program: loading may take minutes."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def deliver(result: Result | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, problem = None, None
        try:
            result = work()
        except Exception as error:
            problem = error
        with suppress(RuntimeError):  # the loop is closed once the result is not waited for
            loop.call_soon_threadsafe(deliver, result, problem)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await done


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m appliance.llamacpp", description="Serve one GGUF model on a CPU.")
    parser.add_argument("--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("--alias", help="name of the model in the API (default: the file's name)")
    parser.add_argument("--threads", type=_positive, default=_usable_cpus(), help="default: all usable CPUs")
    parser.add_argument("--context-tokens", type=_positive, default=8_192, help="KV cells, shared by all sequences")
    parser.add_argument(
        "--slot-tokens",
        "--lane-tokens",
        dest="slot_tokens",
        type=int,
        help="of the KV cells, how many each sequence gets for itself (0: none; "
        "default: what is left beside one sequence of the model's full length; none with the native kernels)",
    )
    parser.add_argument("--sequences", type=_positive, default=8, help="sequences that may run at once")
    parser.add_argument("--batch-tokens", type=_positive, default=512, help="most tokens in one step")
    parser.add_argument("--max-queued-requests", type=_positive, default=256)
    parser.add_argument("--max-body-bytes", type=_positive, default=MAX_BODY_BYTES)
    parser.add_argument("--chat-template", type=Path, help="a file that replaces the template in the model's own")
    parser.add_argument(
        "--tool-format",
        choices=sorted(SYNTAXES),
        help="how the model writes calls (default: as its template says)",
    )
    parser.add_argument("--plain-kernels", action="store_true", help="compute with llama.cpp's own kernels alone")
    add_worker_arguments(parser)
    options = parser.parse_args(argv)
    if (
        options.slot_tokens is not None
        and not 0 <= options.slot_tokens <= options.context_tokens // 2 // options.sequences
    ):
        parser.error(f"--slot-tokens {options.slot_tokens} for each sequence is not within half of --context-tokens")
    if options.drain_seconds < 0:
        parser.error(f"--drain-seconds {options.drain_seconds} is negative")
    return options


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


if __name__ == "__main__":
    # A model that is still being loaded holds a thread deep in C++, which does not survive Python's own way out.
    os._exit(main())
