"""The profilers side by side: is the task right, does complexity find what a weak model gets wrong, what does it cost.

`scripts/bench profile [--data DIR] [--quick] [--engine unix:/path/to.sock --model NAME]`. DIR holds the open evaluation
data (its `routing` folder and `score_routing.py`); it is no part of the repository.

APGR: area under the gain curve when calls go to the strong model in order of complexity; random is 0.5. Three readings:
all rows, for what learned nothing (length, rules); the fifth of the rows that the shipped weights never saw; and all
rows again, for weights trained here without the data set that they are tested on and without its kind: that one is what
to expect of texts of another origin. The rules' cues were written with the mixed requests in sight, so their accuracy
there is the best they can do; the learned profiler looks at the cues too, so in part that holds for it.
"""

import argparse
import asyncio
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from appliance.core import Caller, Profiler, Request, Target
from appliance.errors import ApplianceError
from appliance.router.profile import profile_request
from appliance.router.profile.estimate import ProfileEstimate
from appliance.router.profile.linear_model import FILE, LinearWeights, load_shipped_weights
from appliance.router.profile.linear_model import guess_profile as learned_guess
from appliance.router.profile.llm_prompt import make_profile_guess, make_question, read_llm_profile, take_excerpt
from appliance.router.profile.rules import guess_profile as rules_guess
from appliance.router.profile.text_sample import take_sample
from appliance.upstream import client
from appliance.upstream.local import LocalTransport
from scripts.profile_data import KIN, LICENCES, RIGHT, Row, read_rows
from scripts.train_profile import WEIGHTS_PATH, made_rows, train, without

ROOT: Final = Path(__file__).resolve().parents[2]
_CHARACTERS_PER_TOKEN: Final = 4
_TIMED_TOKENS: Final = 2000
_TIMED_CALLS: Final = 1000
_TIMED: Final[tuple[Profiler, ...]] = ("rules", "learned")
_MEASURED: Final = ("mmlu", "gsm8k", "llmrouter")

Guesser = Callable[[Row], ProfileEstimate]
Apgr = Callable[[Sequence[tuple[float, float, float]]], float]


@dataclass(frozen=True, slots=True)
class Reading:
    """One guesser on one set of rows."""

    name: str
    guesser: Guesser
    rows: Sequence[Row]


def data_folder(given: Path | None) -> Path:
    folder = given or Path(os.environ.get("APPLIANCE_EVAL_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "routing").is_dir():
        raise SystemExit(
            f"{folder} has no folder `routing`: name the evaluation data with --data or APPLIANCE_EVAL_DATA"
        )
    return folder


def apgr_of(folder: Path) -> Apgr:
    """The data's own scoring function."""
    spec = importlib.util.spec_from_file_location("score_routing", folder / "score_routing.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    score: Apgr = module.apgr
    return score


def request_of(row: Row) -> Request:
    return Request(
        id="request",
        decision_id="decision",
        endpoint="chat",
        model="auto",
        body={},
        text=row.text,
        stream=False,
        caller=Caller(key_id="bench", name="bench"),
        received=0.0,
        received_at=0.0,
        format="tools" if row.has_tools else "text",
    )


def by_rules(row: Row) -> ProfileEstimate:
    tokens = len(row.text) // _CHARACTERS_PER_TOKEN
    return rules_guess(request_of(row), take_sample(row.text), prompt_tokens=tokens)


def by_length(row: Row) -> ProfileEstimate:
    return ProfileEstimate("chat", float(len(row.text)), ())


def by_weights(weights: LinearWeights) -> Guesser:
    return lambda row: learned_guess(request_of(row), take_sample(row.text), weights)


def accuracy(guesser: Guesser, rows: Sequence[Row]) -> str:
    right = sum(is_right(guesser(row), row) for row in rows)
    return f"{right / len(rows):.3f} ({len(rows)})"


def is_right(guess: ProfileEstimate, row: Row) -> bool:
    return guess.task in RIGHT[row.kind] or guess.task == row.task


def apgr_row(apgr: Apgr, guesser: Guesser, rows: Sequence[Row]) -> str:
    return f"{apgr([(row.weak, row.strong, guesser(row).complexity) for row in rows]):.3f} ({len(rows)})"


def tasks_table(rows: Sequence[Row], *, quick: bool) -> Table:
    mixed = [row for row in rows if row.dataset == "mixed"]
    unseen = [row for row in mixed if row.is_test]
    worded = [row for row in mixed if row.source not in ("llmrouter", "mtbench")]
    table = _table(
        "task right on mixed_requests.jsonl (rows)", "all rows", "not trained on", "instructions, not trained on"
    )
    table.add_row("rules", accuracy(by_rules, mixed), accuracy(by_rules, unseen), accuracy(by_rules, worded))
    apart = "-" if quick else accuracy(by_weights(train(_without_mixed(rows))), worded)
    table.add_row("learned", "-", accuracy(by_weights(load_shipped_weights()), unseen), apart)
    return table


def _without_mixed(rows: Iterable[Row]) -> list[Row]:
    kept = [row for row in rows if row.source in LICENCES and row.dataset != "mixed"]
    return [*kept, *made_rows()]


def apgr_table(rows: Sequence[Row], apgr: Apgr, *, quick: bool) -> Table:
    table = _table("APGR (rows)", *_MEASURED, "mtbench")
    sets = [[row for row in rows if row.dataset == name] for name in (*_MEASURED, "mtbench")]
    unseen = [[row for row in one if row.is_test] for one in sets]
    table.add_row("length, all rows", *(apgr_row(apgr, by_length, one) for one in sets))
    table.add_row("rules, all rows", *(apgr_row(apgr, by_rules, one) for one in sets))
    if not quick:
        others = [by_weights(train(without(rows, name))) for name in _MEASURED]
        cells = [apgr_row(apgr, guesser, one) for guesser, one in zip(others, sets[:-1], strict=True)]
        table.add_row("[b]learned without this set, all rows[/b]", *cells, "-")
    table.add_row("length, test fifth", *(apgr_row(apgr, by_length, one) for one in unseen))
    table.add_row("rules, test fifth", *(apgr_row(apgr, by_rules, one) for one in unseen))
    table.add_row(
        "learned as shipped, test fifth", *(apgr_row(apgr, by_weights(load_shipped_weights()), one) for one in unseen)
    )
    return table


def time_table(rows: Sequence[Row]) -> Table:
    """The whole of `profile_request`, on texts of about 2,000 tokens cut from the data, each a different one."""
    table = _table(f"microseconds at {_TIMED_TOKENS:,} tokens", "median", "p99", "CPU median", "CPU p99")
    everything = "\n".join(row.text for row in rows if row.dataset == "mixed")
    size = _TIMED_TOKENS * _CHARACTERS_PER_TOKEN
    step = max(1, (len(everything) - size) // _TIMED_CALLS)
    texts = [everything[at : at + size] for at in range(0, len(everything) - size, step)]
    requests = [request_of(Row("made", "made", "", text, None)) for text in texts]
    for name in _TIMED:
        wall, cpu = [], []
        for request in requests:
            started, busy = time.perf_counter_ns(), time.thread_time_ns()
            profile_request(request, prompt_tokens=_TIMED_TOKENS, output_tokens=None, profiler=name)
            cpu.append((time.thread_time_ns() - busy) / 1000)
            wall.append((time.perf_counter_ns() - started) / 1000)
        table.add_row(name, *(f"{one:.0f}" for taken in (wall, cpu) for one in _median_and_p99(taken)))
    return table


async def engine_table(rows: Sequence[Row], address: str, model: str, most: int) -> Table:
    """The profiler `llm` on a running engine of this machine, one request at a time and with no limit of time."""
    target = Target(f"onsite/{model}", "onsite", "openai", address, model, frozenset({"chat", "labels"}))
    mixed = [row for row in rows if row.dataset == "mixed" and not row.has_tools]
    asked = mixed[:: max(1, len(mixed) // most)][:most]
    right, taken, errors = 0, [], []
    door = LocalTransport()
    try:
        for row in asked:
            started = time.perf_counter()
            outgoing = make_question(take_excerpt(row.text))
            try:
                letter = client.write_request(target, outgoing, stream=False, salt="bench")
                reply = await client.send_request(door, letter, permit=None, seconds=60)
                guess = make_profile_guess(read_llm_profile(target, reply), by_rules(row))
            except ApplianceError as error:
                errors.append(error.message)
                continue
            taken.append(1000 * (time.perf_counter() - started))
            right += is_right(guess, row)
    finally:
        await door.aclose()
    table = _table("a local model (llm)", "task right", "same rows by rules", "median ms", "p99 ms")
    if len(taken) < 2:
        raise SystemExit(f"{address} did not answer: {errors[0] if errors else 'there are no rows'}")
    quantiles = [f"{one:.0f}" for one in _median_and_p99(taken)]
    table.add_row(model, f"{right / len(taken):.3f} ({len(taken)})", accuracy(by_rules, asked), *quantiles)
    return table


def _median_and_p99(values: Sequence[float]) -> tuple[float, float]:
    return statistics.median(values), statistics.quantiles(values, n=100)[98]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--quick", action="store_true", help="train nothing: only the shipped weights")
    parser.add_argument("--engine", help="address of a running engine, for the profiler llm")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the engine's name for its model")
    parser.add_argument("--rows", type=int, default=100, help="how many requests the engine is asked about")
    options = parser.parse_args()
    folder = data_folder(options.data)
    rows = read_rows(folder / "routing")
    console = Console(width=150)
    tables: list[Any] = [
        tasks_table(rows, quick=options.quick),
        apgr_table(rows, apgr_of(folder), quick=options.quick),
        time_table(rows),
    ]
    if options.engine:
        tables.append(asyncio.run(engine_table(rows, options.engine, options.model, options.rows)))
    for table in tables:
        console.print(table, "")
    console.print(f"{FILE}: {WEIGHTS_PATH.stat().st_size:,} bytes; learned from {kin_note()}")


def kin_note() -> str:
    sources = load_shipped_weights().about["sources"]
    listed = ", ".join(f"{one['name']} {one['texts']} ({one['licence']})" for one in sources)
    kin = ", ".join(sorted(kind for kinds in KIN.values() for kind in kinds))
    return f"{listed}. Left out together with the set they resemble: {kin}"


if __name__ == "__main__":
    main()
