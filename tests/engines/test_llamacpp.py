"""The CPU engine's command line, memory arithmetic and readings."""

from dataclasses import asdict
from pathlib import Path

import pytest

from appliance.catalog import load_catalog
from appliance.core import EngineLoad
from appliance.engines.base import EngineShape, Placement, read_load
from appliance.engines.llamacpp import LlamaCpp
from appliance.errors import BackendGarbage

ENGINE = LlamaCpp()
MODEL = load_catalog().embedded
LOAD = EngineLoad(3, 2, 16, 900, 400, 1200, 64, 8192, 77, 5000, 900, 533.0, {1: 243.0, 8: 381.0})


def _placement() -> Placement:
    return Placement(
        model="tiny",
        variant="q4_1",
        engine="llamacpp",
        path=Path("/models/tiny.gguf"),
        shape=EngineShape(
            threads=2, context_tokens=8192, sequences=16, sequence_context_tokens=8192, max_queued_requests=256
        ),
        memory=ENGINE.estimate_memory(MODEL, MODEL.variants[0], context_tokens=8192, sequences=16),
        abilities=frozenset({"chat"}),
        reasons=(),
    )


def test_the_command_line_is_one_that_the_engine_understands() -> None:
    argv = ENGINE.build_argv("python3", _placement(), socket=Path("/run/0.sock"), parent_guard_fd=7, drain_seconds=30)
    assert argv[:3] == ["python3", "-m", "appliance.llamacpp"]
    options = dict(zip(argv[3::2], argv[4::2], strict=True))
    assert options == {
        "--model": "/models/tiny.gguf",
        "--uds": "/run/0.sock",
        "--alias": "tiny",
        "--threads": "2",
        "--context-tokens": "8192",
        "--sequences": "16",
        "--max-queued-requests": "256",
        "--drain-seconds": "27.0",
        "--parent-guard-fd": "7",
    }


@pytest.mark.parametrize(
    ("context_tokens", "sequences", "measured_bytes"),
    [(2048, 1, 268_600_000), (8192, 16, 416_200_000), (8192, 32, 421_800_000), (38_912, 16, 1_145_200_000)],
)
def test_the_arithmetic_is_a_little_above_what_was_measured(
    context_tokens: int, sequences: int, measured_bytes: int
) -> None:
    """Resident memory of the embedded model after chats, labels and schemas, on Linux with llama-cpp-python 0.3.36."""
    memory = ENGINE.estimate_memory(MODEL, MODEL.variants[0], context_tokens=context_tokens, sequences=sequences)
    assert measured_bytes < memory.total_bytes < measured_bytes + 150_000_000


def test_cells_are_counted_as_llama_cpp_rounds_them() -> None:
    memory = [
        ENGINE.estimate_memory(MODEL, MODEL.variants[0], context_tokens=tokens, sequences=1)
        for tokens in (2049, 2304, 2305)
    ]
    assert memory[0] == memory[1]
    assert memory[1].kv_bytes < memory[2].kv_bytes


def test_a_load_is_read_whatever_else_the_engine_says() -> None:
    payload = asdict(LOAD) | {"threads": 2, "decode_tokens_per_second": {"1": 243.0, "8": 381.0}}
    assert read_load(payload) == LOAD


@pytest.mark.parametrize("payload", [None, [], {}, {**asdict(LOAD), "steps": "many"}])
def test_anything_else_is_not_a_load(payload: object) -> None:
    with pytest.raises(BackendGarbage, match="/load is not what it promises"):
        read_load(payload)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"event":"loading"}', '{"event":"model_file_error","reason":"it is cut off"}'], "it is cut off"),
        (['{"event":"engine_failed","reason":"out of room"}', '{"event":"stopped"}'], "out of room"),
        (["Traceback (most recent call last):", "ValueError: no"], "ValueError: no"),
        (['{"event":"loading"}', '{"event":"ready"}'], ""),
        (["12"], ""),
        ([], ""),
    ],
)
def test_the_last_words_are_the_reason_and_not_the_whole_log(lines: list[str], words: str) -> None:
    assert ENGINE.find_crash_reason(lines) == words
