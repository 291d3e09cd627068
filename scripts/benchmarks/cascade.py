"""Cascades measured on open data: streams of texts that the classifier was not trained on, answered as a route with a
cascade answers them, with the labels of the data as the reference.

Each split trains the product's encoder program on some rows and draws streams from the others. A text stands where the
classifier is sure enough by the threshold in force and in scope; else the reference answers it. A share of all texts is
audited, and the threshold is estimated anew every so many texts, from held-out rows and audits, as a node does.
`over` counts streams of which more than the bound was answered here and wrong.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from appliance.encoders.server import EncoderEndpoints, make_app
from appliance.encoders.service import EncoderService
from appliance.quality.rules import combine_thresholds

ROOT: Final = Path(__file__).resolve().parents[2]
SETS: Final[Mapping[str, int]] = {"banking77": 1200, "agnews": 600, "sms_spam": 600}
"""And how many rows a classifier is trained on."""
SPLITS: Final = 5
STREAMS: Final = 4
"""Of each split."""
STREAM_TEXTS: Final = 500
ANEW_TEXTS: Final = 100
AUDIT_SHARE: Final = 0.05
CONFIDENCE: Final = 0.95

Row = Mapping[str, str]


@dataclass(frozen=True)
class Answered:
    """What the classifier says of one text. `sure` is 0 out of scope."""

    sure: float
    right: bool


@dataclass(frozen=True)
class Streamed:
    local_share: float
    wrong_share: float
    """Of all texts: answered here, and not as the reference would."""
    accuracy: float
    """Of all answers, the reference's included."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench cascade", description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path.home() / ".local/share/appliance")
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--bounds", nargs="*", type=float, default=[0.02, 0.05, 0.10])
    parser.add_argument("--tier", default="words", choices=("words", "encoder"))
    parser.add_argument("--json", type=Path, help="where the figures are written")
    asyncio.run(_run(parser.parse_args()))


async def _run(options: argparse.Namespace) -> None:
    head = ("set", "rows", "bound", "answered here", "of them wrong", "mean", "worst", "over")
    print("{:<10}{:>6}{:>7}{:>15}{:>15}{:>8}{:>8}{:>8}".format(*head))
    results = []
    for name in options.sets:
        began = time.monotonic()
        found: dict[float, list[Streamed]] = {bound: [] for bound in options.bounds}
        for split in range(SPLITS):
            for bound, streams in (await _split(name, split, options)).items():
                found[bound] += streams
        for bound, streams in found.items():
            row = {"set": name, "rows": SETS[name], "bound": bound, **summed(streams, bound)}
            results.append(row)
            print(
                f"{name:<10}{row['rows']:>6}{bound:>7.0%}{row['local_share']:>15.1%}{row['wrong_of_local']:>15.1%}"
                f"{row['wrong_mean']:>8.2%}{row['wrong_worst']:>8.2%}{row['over']:>8}",
                flush=True,
            )
        print(f"  {time.monotonic() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def summed(streams: Sequence[Streamed], bound: float) -> Mapping[str, Any]:
    local = statistics.fmean(one.local_share for one in streams)
    wrong = statistics.fmean(one.wrong_share for one in streams)
    return {
        "local_share": local,
        "wrong_of_local": wrong / local if local else 0.0,
        "wrong_mean": wrong,
        "wrong_worst": max(one.wrong_share for one in streams),
        "over": f"{sum(one.wrong_share > bound for one in streams)}/{len(streams)}",
        "accuracy": statistics.fmean(one.accuracy for one in streams),
    }


async def _split(name: str, seed: int, options: argparse.Namespace) -> Mapping[float, Sequence[Streamed]]:
    chance = random.Random(seed)
    rows = _rows(name)
    chance.shuffle(rows)
    known, unseen = rows[: SETS[name]], rows[SETS[name] :]
    with tempfile.TemporaryDirectory() as folder:
        desk = EncoderService(data=Path(folder), models=options.data_dir / "models", threads=os.cpu_count() or 1)
        transport = httpx.ASGITransport(make_app(EncoderEndpoints(desk)))
        async with httpx.AsyncClient(transport=transport, base_url="http://encoders", timeout=600) as client:
            begun = await client.post("/v1/classifiers", json={"name": name, "examples": known, "tier": options.tier})
            begun.raise_for_status()
            await desk.training_jobs.wait_until_idle()
            answered = await _answered(client, name, unseen)
            found: dict[float, list[Streamed]] = {bound: [] for bound in options.bounds}
            for _ in range(STREAMS):
                drawn = chance.sample(answered, min(STREAM_TEXTS, len(answered)))
                for bound in options.bounds:
                    found[bound].append(await _stream(client, name, drawn, bound, chance))
    return found


async def _answered(client: httpx.AsyncClient, name: str, rows: Sequence[Row]) -> Sequence[Answered]:
    told = (await client.post("/v1/classify", json={"model": name, "texts": [row["text"] for row in rows]})).json()
    answers = []
    for row, shares, strange in zip(rows, told["probabilities"], told["out_of_scope"], strict=True):
        best = max(range(len(shares)), key=shares.__getitem__)
        answers.append(Answered(0.0 if strange > 0 else shares[best], told["labels"][best] == row["label"]))
    return answers


async def _stream(
    client: httpx.AsyncClient, name: str, texts: Sequence[Answered], bound: float, chance: random.Random
) -> Streamed:
    """Audited texts are the reference's, as a node answers them."""
    audits: list[tuple[float, bool]] = []
    local = wrong = 0
    for start in range(0, len(texts), ANEW_TEXTS):
        body = {"bound": bound, "confidence": CONFIDENCE, "over_texts": len(texts), "live": audits}
        standing = combine_thresholds((await client.post(f"/v1/classifiers/{name}/threshold", json=body)).json(), bound)
        for text in texts[start : start + ANEW_TEXTS]:
            if chance.random() < AUDIT_SHARE:
                audits.append((text.sure, text.right))
            elif standing.threshold is not None and 0 < text.sure >= standing.threshold:
                local += 1
                wrong += not text.right
    return Streamed(local / len(texts), wrong / len(texts), 1 - wrong / len(texts))


def _rows(name: str) -> list[Row]:
    """Test and few-shot rows together, each text once."""
    folder = os.environ.get("APPLIANCE_EVAL_DATA")
    place = (Path(folder) if folder else ROOT.parent / "shared" / "data") / "classification"
    found: dict[str, Row] = {}
    for part in ("test", "fewshot"):
        for line in (place / f"{name}_{part}.jsonl").read_text("utf-8").splitlines():
            row = json.loads(line)
            found.setdefault(row["text"], {"text": row["text"], "label": row["label"]})
    return list(found.values())


if __name__ == "__main__":
    main()
