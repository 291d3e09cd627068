"""Classifiers measured on open data: each is trained by the product and measured on rows that it was not trained on.

`data/classification` is looked for in APPLIANCE_EVAL_DATA, else beside the repository in shared/data; embedding models
in DATA_DIR/models. `folds`: the set's rows, test and few-shot files together, are cut into six parts, and each part is
asked of a classifier trained on the other five (banking77: 1,988 rows). `few`: trained on the few-shot file, measured
on the test file.

`wanted` is what the training was told: `words` (no encoder), `-` (no accuracy: the encoder where it is worth it), a
number (the accuracy asked for on held-out rows), `most` (one that nothing reaches, so the most accurate mixture).
`asked` is the share of unseen texts that the encoder was asked about. `local` is the share that is answered here at a
bound of 5 %, and `over` counts the streams that exceeded it: the threshold comes from the version's own held-out
rows, for a stream of that length, with a confidence of 95 %, and of each part 20 streams of half its rows are drawn.
`text/s` is of one process without HTTP, of processor time. Last, the out-of-scope score: the area under its ROC curve
and the share that is flagged, of texts of the other sets (`foreign`) and of texts of this set whose labels the training
never saw (`left out`, every third label); `false alarms` are flagged texts of labels that it knows.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

from appliance.encoders.embedders import Embedded, Embedder
from appliance.encoders.model_cache import ModelCache
from appliance.encoders.training.examples import read_examples
from appliance.encoders.training.metrics import compute_ece
from appliance.encoders.training.selective_risk import find_threshold
from appliance.encoders.training.trainer import CandidateModels, Trainer, train_classifier
from appliance.encoders.two_stage import ClassifierHead, StageAnswers, TrainedClassifier

ROOT: Final = Path(__file__).resolve().parents[2]
SETS: Final = ("banking77", "agnews", "sms_spam")
WANTED: Final = ("words", "-", "0.88", "most")
FOLDS: Final = 6
STREAMS: Final = 20
BOUND: Final = 0.05
CONFIDENCE: Final = 0.95
BATCH: Final = 256
FOREIGN_ROWS: Final = 500

Row = Mapping[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench classifiers", description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path.home() / ".local/share/appliance")
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=SETS)
    parser.add_argument("--wanted", nargs="*", default=list(WANTED), help="words, -, most, or an accuracy")
    parser.add_argument("--how", nargs="*", default=["folds", "few"], choices=("folds", "few"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="where the figures are written")
    options = parser.parse_args()
    began = time.monotonic()
    library = ModelCache(options.data_dir / "models", options.threads)
    real = next(iter(library.load_encoders().values()), None)
    models = CandidateModels(library.find_static(), None if real is None else _Remembering(real))
    results = []
    print(
        f"{'set':<10}{'rows':>5} {'how':<6}{'wanted':<7}{'features':<82}{'accuracy':>8}{'ECE':>7}{'asked':>7}"
        f"{'local':>7}{'over':>7}{'text/s':>8}"
    )
    for name in options.sets:
        for how in options.how:
            for result in measured(name, how, options.wanted, models, real):
                results.append(result)
                print(
                    f"{name:<10}{result['trained_on']:>5} {how:<6}{result['wanted']:<7}{result['features']:<82}"
                    f"{result['accuracy']:>8.3f}{result['ece']:>7.3f}{result['asked_share']:>7.1%}"
                    f"{result['local_share']:>7.1%}{result['streams_over']:>7}"
                    f"{result['texts_per_cpu_second']:>8,.0f}",
                    flush=True,
                )
    scope = [out_of_scope(name, models) for name in options.sets if "folds" in options.how]
    for row in scope:
        print(
            f"{row['set']:<10}out of scope: foreign {row['foreign_auroc']:.3f} ({row['foreign_flagged']:.1%} flagged), "
            f"left out {_shown(row['left_out_auroc'])} ({_shown(row['left_out_flagged'])} flagged), "
            f"false alarms {row['false_alarms']:.1%}"
        )
    print(f"{time.monotonic() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps({"rows": results, "out_of_scope": scope}, indent=1))


def _shown(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.3f}"


def measured(
    name: str, how: str, wanted: Sequence[str], models: CandidateModels, real: Embedder | None
) -> Sequence[Mapping[str, Any]]:
    """A row for each of `wanted`, over all parts together."""
    seen = {one: _Sums() for one in wanted}
    for number, (known, unseen) in enumerate(_parts(name, how)):
        examples = read_examples(list(known), None, None, at_least=2)
        bench = Trainer(examples, models)
        for one in wanted:
            made = train_classifier(
                examples,
                models,
                wanted_accuracy={"words": None, "-": None, "most": 0.9999}.get(one) or _number(one),
                max_tier="words" if one == "words" else "encoder",
                progress=lambda *_: None,
                clock=time.monotonic,
                trainer=bench,
            )
            seen[one].add(made, unseen, models.encoder, number)
            if number == 0:
                seen[one].rate = _rate(made.head(real), [row["text"] for row in unseen][:BATCH])
    return [{"set": name, "how": how, "wanted": one, **sums.facts()} for one, sums in seen.items()]


def _number(wanted: str) -> float | None:
    return float(wanted) if wanted not in ("words", "-") else None


class _Sums:
    def __init__(self) -> None:
        self.sure: list[Any] = []
        self.right: list[Any] = []
        self.asked: list[float] = []
        self.shares: list[float] = []
        self.used: list[str] = []
        self.over, self.rate, self.trained_on = 0, 0.0, 0

    def add(self, made: TrainedClassifier, unseen: Sequence[Row], encoder: Embedder | None, seed: int) -> None:
        head = made.head(encoder)
        found = _answers(head, [row["text"] for row in unseen])
        truth = np.array([made.labels.index(row["label"]) for row in unseen])
        self.sure.append(found.probabilities.max(axis=1))
        self.right.append(found.probabilities.argmax(axis=1) == truth)
        self.asked.append(1.0 if head.first.encoder is not None else float(found.escalated.mean()))
        share, failed = _streams(made, self.sure[-1], self.right[-1], seed)
        self.shares.append(share)
        self.over += failed
        self.used.append(str(made.report["recipe"]))
        self.trained_on = len(made.held_right)

    def facts(self) -> Mapping[str, Any]:
        answers = np.concatenate(self.right)
        return {
            "features": max(set(self.used), key=self.used.count),
            "trained_on": self.trained_on,
            "measured_on": int(answers.size),
            "accuracy": float(answers.mean()),
            "ece": compute_ece(np.concatenate(self.sure), answers),
            "asked_share": float(np.mean(self.asked)),
            "local_share": float(np.mean(self.shares)),
            "streams_over": f"{self.over}/{STREAMS * len(self.shares)}",
            "texts_per_cpu_second": self.rate,
        }


def out_of_scope(name: str, models: CandidateModels) -> Mapping[str, Any]:
    """The score on texts of other sets, and on texts whose labels were left out of the training."""
    rows, unseen = next(_parts(name, "folds"))
    own = _strange(_words(rows, models), [row["text"] for row in unseen])
    others = [other for other in SETS if other != name]
    foreign_texts = [row["text"] for other in others for row in _rows(f"{other}_test")[: FOREIGN_ROWS // len(others)]]
    foreign = _strange(_words(rows, models), foreign_texts)
    labels = sorted({row["label"] for row in rows})
    hidden = set(labels[:: 3 if len(labels) > 2 else len(labels) + 1])
    hidden = hidden if len(labels) - len(hidden) >= 2 and len(labels) > 2 else set()
    left_out = None
    if hidden:
        made = _words([row for row in rows if row["label"] not in hidden], models)
        inside = _strange(made, [row["text"] for row in unseen if row["label"] not in hidden])
        left_out = (inside, _strange(made, [row["text"] for row in unseen if row["label"] in hidden]))
    return {
        "set": name,
        "foreign_auroc": _auroc(own, foreign),
        "foreign_flagged": float((foreign > 0).mean()),
        "left_out_auroc": None if left_out is None else _auroc(*left_out),
        "left_out_flagged": None if left_out is None else float((left_out[1] > 0).mean()),
        "false_alarms": float((own > 0).mean()),
    }


def _words(rows: Sequence[Row], models: CandidateModels) -> TrainedClassifier:
    examples = read_examples(list(rows), None, None, at_least=2)
    return train_classifier(
        examples, models, wanted_accuracy=None, max_tier="words", progress=lambda *_: None, clock=time.monotonic
    )


def _strange(made: TrainedClassifier, texts: Sequence[str]) -> Any:
    return _answers(made.head(None), texts).ood_scores - made.ood_threshold


def _auroc(inside: Any, outside: Any) -> float:
    truth = np.concatenate([np.zeros(inside.size), np.ones(outside.size)])
    return float(roc_auc_score(truth, np.concatenate([inside, outside])))


def _answers(head: ClassifierHead, texts: Sequence[str]) -> StageAnswers:
    parts = [head.answer(texts[at : at + BATCH]) for at in range(0, len(texts), BATCH)]
    return StageAnswers(
        np.vstack([part.probabilities for part in parts]),
        np.concatenate([part.ood_scores for part in parts]),
        np.concatenate([part.escalated for part in parts]),
    )


def _rate(head: ClassifierHead, texts: Sequence[str]) -> float:
    """Texts a second of processor time, of texts whose words were seen before."""
    head.answer(texts)
    began, calls = time.process_time(), 0
    while calls < 2 or (calls < 20 and time.process_time() - began < 0.5):
        head.answer(texts)
        calls += 1
    return calls * len(texts) / (time.process_time() - began)


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


def _streams(made: TrainedClassifier, sure: Any, right: Any, seed: int) -> tuple[float, int]:
    """The share of unseen texts that is answered under the bound, and how many streams exceed it."""
    held = list(zip(made.held_confidences.tolist(), made.held_right.tolist(), strict=True))
    threshold = find_threshold(BOUND, CONFIDENCE, held, next_rows=sure.size // 2).threshold
    if threshold is None:
        return 0.0, 0
    stands = sure >= threshold
    wrong = stands & ~right
    chance = np.random.default_rng(seed)
    drawn = [chance.choice(wrong.size, wrong.size // 2, replace=False) for _ in range(STREAMS)]
    return float(stands.mean()), sum(bool(wrong[places].mean() > BOUND) for places in drawn)


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
