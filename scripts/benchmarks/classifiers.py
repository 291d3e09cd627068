"""Classifiers measured on open data: each is trained by the product and measured on rows that it was not trained on.

`data/classification` is looked for in APPLIANCE_EVAL_DATA, else beside the repository in shared/data; embedding models
in DATA_DIR/models. `folds` means that the set's rows, test and few-shot files together, are cut into six parts, and
each part is asked of a classifier trained on the other five (banking77: 1,988 rows); `few` means trained on the
few-shot file and measured on the test file. The bound is checked on streams: the threshold comes from the version's own
held-out rows, for a stream of that length, and 20 streams of half the unseen rows are drawn.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from sklearn.model_selection import StratifiedKFold

from appliance.encoders.bounds import threshold_for
from appliance.encoders.embedders import Embedded, Embedder
from appliance.encoders.examples import read_examples
from appliance.encoders.heads import TIERS, Head, Linear, Scorer, Tier
from appliance.encoders.library import Library
from appliance.encoders.measures import ece
from appliance.encoders.training import Models, Trained, train

ROOT: Final = Path(__file__).resolve().parents[2]
SETS: Final = ("banking77", "agnews", "sms_spam")
FOLDS: Final = 6
STREAMS: Final = 20
BOUND: Final = 0.05
CONFIDENCE: Final = 0.95

Row = Mapping[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench classifiers", description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path.home() / ".local/share/appliance")
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=SETS)
    parser.add_argument("--tiers", nargs="*", default=list(TIERS), choices=TIERS)
    parser.add_argument("--how", nargs="*", default=["folds", "few"], choices=("folds", "few"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="where the figures are written")
    options = parser.parse_args()
    library = Library(options.data_dir / "models", options.threads)
    results = []
    print(
        f"{'set':<11}{'rows':>6}{'how':>7}  {'features':<34}{'accuracy':>9}{'ECE':>7}{'share':>7}{'over':>6}"
        f"{'text/s':>9}"
    )
    for name in options.sets:
        for tier in options.tiers:
            for how in options.how:
                result = measured(name, how, tier, library)
                results.append(result)
                print(
                    f"{name:<11}{result['trained_on']:>6}{how:>7}  {result['features']:<34}{result['accuracy']:>9.3f}"
                    f"{result['ece']:>7.3f}{result['local_share']:>7.2f}{result['streams_over']:>6}"
                    f"{result['texts_per_second']:>9,.0f}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def measured(name: str, how: str, tier: Tier, library: Library) -> Mapping[str, Any]:
    """Over all parts together. `local_share` and `streams_over` are about the bound."""
    real = next(iter(library.encoders().values()), None) if tier == "encoder" else None
    models = Models(library.vectors(), None if real is None else _remembering(real))
    sure: list[Any] = []
    right: list[Any] = []
    shares: list[float] = []
    used: list[str] = []
    over, rate = 0, 0.0
    counted = 0
    for known, unseen in _parts(name, how):
        made = _trained(known, tier, models)
        used.append(made.recipe.name)
        counted = len(known)
        head = _head(made, models)
        texts = [row["text"] for row in unseen]
        scores = np.vstack([head.scores(texts[at : at + 256]) for at in range(0, len(texts), 256)])
        if not shares:
            rate = _rate(replace(head, encoder=real if head.encoder is not None else None), texts[:256])
        found = head.calibration.probabilities(scores)
        truth = np.array([made.labels.index(row["label"]) for row in unseen])
        sure.append(found.max(axis=1))
        right.append(found.argmax(axis=1) == truth)
        share, failed = _streams(made, sure[-1], right[-1], len(shares))
        shares.append(share)
        over += failed
    answers = np.concatenate(right)
    return {
        "set": name,
        "how": how,
        "tier": tier,
        "features": max(set(used), key=used.count),
        "trained_on": counted,
        "measured_on": int(answers.size),
        "accuracy": float(answers.mean()),
        "ece": ece(np.concatenate(sure), answers),
        "local_share": float(np.mean(shares)),
        "streams_over": f"{over}/{STREAMS * len(shares)}",
        "texts_per_second": rate,
    }


_KEPT: dict[str, "_Remembering"] = {}


def _remembering(encoder: Embedder) -> "_Remembering":
    return _KEPT.setdefault(encoder.name, _Remembering(encoder))


def _rate(head: Head, texts: Sequence[str]) -> float:
    """Texts a second in one call after another, in this process: no HTTP, no router."""
    head.scores(texts)
    began = time.perf_counter()
    head.scores(texts)
    return len(texts) / (time.perf_counter() - began)


class _Remembering:
    """An encoder that computes each text once: the parts of a set share most of theirs."""

    def __init__(self, encoder: Embedder) -> None:
        self.name, self.dimensions, self.max_tokens = encoder.name, encoder.dimensions, encoder.max_tokens
        self.fingerprint, self.steps = encoder.fingerprint, 0
        self._encoder = encoder
        self._known: dict[str, Any] = {}

    def embed(self, texts: Sequence[str], *, truncate: bool = False) -> Embedded:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, self._encoder.embed(new, truncate=truncate).vectors, strict=True))
        return Embedded(np.stack([self._known[text] for text in texts]), [0] * len(texts))


def _streams(made: Trained, sure: Any, right: Any, seed: int) -> tuple[float, int]:
    """The share of unseen texts that is answered under the bound, and how many streams exceed it."""
    held = list(zip(made.held_confidences.tolist(), made.held_right.tolist(), strict=True))
    threshold = threshold_for(BOUND, CONFIDENCE, held, next_rows=sure.size // 2).threshold
    if threshold is None:
        return 0.0, 0
    stands = sure >= threshold
    wrong = stands & ~right
    chance = np.random.default_rng(seed)
    drawn = [chance.choice(wrong.size, wrong.size // 2, replace=False) for _ in range(STREAMS)]
    return float(stands.mean()), sum(bool(wrong[places].mean() > BOUND) for places in drawn)


def _trained(known: Sequence[Row], tier: Tier, models: Models) -> Trained:
    examples = read_examples(list(known), None, None, at_least=2)
    # An accuracy that nothing reaches, so that every recipe is tried and the best is taken.
    wanted = None if tier == TIERS[0] else 0.9999
    return train(examples, models, wanted_accuracy=wanted, dearest=tier, progress=lambda *_: None, clock=time.monotonic)


def _head(made: Trained, models: Models) -> Head:
    encoder = models.encoder if "encoder" in made.linear.weights else None
    scorer = Scorer(made.lexicon, Linear(made.linear.weights, made.linear.bias))
    weights = made.linear.weights.get("encoder")
    return Head(made.labels, scorer, encoder, weights, made.calibration, made.strange_from)


def _parts(name: str, how: str) -> Iterator[tuple[Sequence[Row], Sequence[Row]]]:
    """What is trained on, and what is measured on."""
    test, few = _rows(f"{name}_test"), _rows(f"{name}_fewshot")
    if how == "few":
        yield few, test
        return
    rows = [*test, *few]
    splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    for known, unseen in splitter.split(np.zeros(len(rows)), [row["label"] for row in rows]):
        yield [rows[place] for place in known], [rows[place] for place in unseen]


def _rows(name: str) -> Sequence[Row]:
    folder = os.environ.get("APPLIANCE_EVAL_DATA")
    path = (Path(folder) if folder else ROOT.parent / "shared" / "data") / "classification" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


if __name__ == "__main__":
    main()
