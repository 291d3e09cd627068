"""Recorded traffic as work for a node: arrivals and token counts from published traces, scaled to a machine. Pure.

A trace row says when a request came, how long its prompt was and how long its answer. Token counts are scaled by one
factor, so that proportions stay; arrivals are scaled by another, so that bursts stay.
"""

import csv
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

FILES: Final = {
    "azure-conv": "azure2023_conv_first_half.csv",
    "azure-code": "azure2023_code_first_half.csv",
    "mooncake": "mooncake_synthetic.csv",
    "servegen": "servegen_msmall_client_rates_2days.csv",
}
_COMMON: Final = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could"
)
_WORDS: Final = _COMMON.split()
"""One token each in most vocabularies."""

Row = tuple[float, int, int, tuple[int, ...]]
"""Arrival, prompt and output tokens, and the ids of its prefix blocks."""

_BLOCK_WORDS: Final = 4
"""Words for one of a trace's prefix blocks (512 tokens there)."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request of a trace, its lengths scaled; `at` in seconds of the trace's own time."""

    at: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    """Ids of the beginnings it shares with others."""


def read_trace(name: str, folder: Path, count: int, mean_prompt_tokens: int, seed: int = 5) -> list[Recorded]:
    """The first `count` requests of a trace. Raises SystemExit where its file is not in `folder`."""
    randomness = random.Random(seed)
    if name == "servegen":  # it has arrivals alone: the lengths are those of the conversations
        lengths: list[Row] = _rows(folder / FILES["azure-conv"])
        arrivals = _renewals(folder / FILES[name], count, randomness)
        rows: list[Row] = [
            (at, prompt, output, ()) for at, (_, prompt, output, _) in zip(arrivals, lengths, strict=False)
        ]
    else:
        rows = _rows(folder / FILES[name])
    rows = rows[:count]
    scale = mean_prompt_tokens * len(rows) / sum(prompt for _, prompt, _, _ in rows)
    longest = 8 * mean_prompt_tokens
    return [
        Recorded(
            at,
            min(longest, max(4, round(prompt * scale))),
            min(longest, max(2, round(output * scale))),
            blocks,
        )
        for at, prompt, output, blocks in rows
    ]


def _rows(path: Path) -> list[Row]:
    try:
        with path.open(newline="") as file:
            return [_row(row) for row in csv.DictReader(file)]
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; name the folder of the traces with --data") from error


def _row(row: dict[str, str]) -> Row:
    blocks = tuple(int(text) for text in row.get("first_prefix_block_ids", "").split())
    return float(row["arrival_s"]), int(row["input_tokens"]), int(row["output_tokens"]), blocks


def _renewals(path: Path, count: int, randomness: random.Random) -> list[float]:
    """Arrivals of many clients together, each with its own rate and burstiness: gamma gaps, as the trace says."""
    try:
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["window_start_s"] == "0"]
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; name the folder of the traces with --data") from error
    clients = [(float(row["req_per_s"]), max(0.05, float(row["cv"]))) for row in rows if float(row["req_per_s"]) > 0]
    horizon = 1.2 * count / sum(rate for rate, _ in clients)
    arrivals = sorted(at for rate, cv in clients for at in _client(rate, cv, horizon, randomness))
    return arrivals[:count]


def _client(rate: float, cv: float, horizon: float, randomness: random.Random) -> Iterator[float]:
    shape = 1 / cv**2
    at = randomness.random() / rate
    while at < horizon:
        yield at
        at += randomness.gammavariate(shape, 1 / (rate * shape))


def chat_body(recorded: Recorded, randomness: random.Random) -> dict[str, Any]:
    """A chat of about so many tokens, of words that mean nothing; beginnings are shared where the trace shares them."""
    words: list[str] = []
    for block in recorded.blocks:
        words += random.Random(block).choices(_WORDS, k=_BLOCK_WORDS)
    words = words[: recorded.prompt_tokens]
    words += randomness.choices(_WORDS, k=max(0, recorded.prompt_tokens - len(words)))
    content = " ".join(words)
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": recorded.output_tokens,
        "temperature": 0.8,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def due_times(trace: Sequence[Recorded], per_second: float) -> list[float]:
    """Seconds from the start at which each is due, for `per_second` on average: bursts stay bursts."""
    span = max(1e-9, trace[-1].at - trace[0].at)
    return [(recorded.at - trace[0].at) / span * len(trace) / per_second for recorded in trace]
