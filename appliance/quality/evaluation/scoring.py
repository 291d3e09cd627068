"""What answers are worth against what is right: the report of one model, and of one against another. Pure."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from appliance.core.json_types import JsonObject
from appliance.quality.evaluation import metrics
from appliance.quality.evaluation.adapters import ANSWER, Adapter
from appliance.quality.evaluation.datasets import DatasetRow

_EDGES: Final = " \t\n.,;:!?'\"()[]"


@dataclass(frozen=True, slots=True)
class GradedRow:
    """What a model said of one row, and its share of what that took."""

    said: JsonObject
    """A row of the node's reply: {answers}, {object, ...} or {error}."""
    model: str | None = None
    """Who answered."""
    cost_usd: float | None = None
    input_tokens: float = 0.0
    output_tokens: float = 0.0

    @property
    def error(self) -> str | None:
        error = self.said.get("error")
        return None if error is None else str(error.get("message") if isinstance(error, Mapping) else error)


@dataclass(frozen=True, slots=True)
class ScoredModel:
    report: JsonObject
    by_row: Sequence[float]
    """From 0 to 1, for comparing models row by row."""


def score_model(
    adapter: Adapter, rows: Sequence[DatasetRow], results: Sequence[GradedRow], seconds: float, labels: Sequence[str]
) -> ScoredModel:
    """`labels`: all that a decision may come to."""
    graded = (
        _decisions(adapter, rows, results, labels) if adapter.kind == "decision" else _objects(adapter, rows, results)
    )
    return ScoredModel({**_effort(results, seconds), **graded.report}, graded.by_row)


def compare_models(ours: ScoredModel, theirs: ScoredModel) -> JsonObject:
    gap = metrics.difference(ours.by_row, theirs.by_row)
    return {"difference": gap.to_json(), "verdict": metrics.verdict(gap)}


def _effort(results: Sequence[GradedRow], seconds: float) -> JsonObject:
    errors = [result.error for result in results if result.error is not None]
    costs = [result.cost_usd for result in results]
    known = [cost for cost in costs if cost is not None]
    return {
        "rows": len(results),
        "answered_by": sorted({result.model for result in results if result.model}),
        "errors": len(errors),
        "commonest_error": Counter(errors).most_common(1)[0][0] if errors else None,
        "cost_usd": sum(known) if len(known) == len(costs) else None,
        "seconds": seconds,
        "answers_per_second": len(results) / seconds if seconds > 0 else None,
        "input_tokens": round(sum(result.input_tokens for result in results)),
        "output_tokens": round(sum(result.output_tokens for result in results)),
    }


def _decisions(
    adapter: Adapter, rows: Sequence[DatasetRow], results: Sequence[GradedRow], labels: Sequence[str]
) -> ScoredModel:
    places = {label: place for place, label in enumerate(labels)}
    answers: list[JsonObject] = [next(iter(result.said.get("answers") or ()), {}) for result in results]
    said = [answer.get("choice") for answer in answers]
    right = [row.right[adapter.gold][0] for row in rows]
    hits = [one == other for one, other in zip(said, right, strict=True)]
    sure = [
        (float(answer["confidence"]), hit) for answer, hit in zip(answers, hits, strict=True) if "confidence" in answer
    ]
    masses = [answer["label_mass"] for answer in answers if answer.get("label_mass") is not None]
    truth = np.array([places[one] for one in right])
    answered = np.array([places.get(str(one), -1) if one is not None else -1 for one in said])
    report = {
        "accuracy": metrics.share(sum(hits), len(hits)).to_json(),
        # Every row has one label and gets one answer, so the F1 over all answers is their accuracy.
        "micro_f1": metrics.share(sum(hits), len(hits)).to_json(),
        "macro_f1": metrics.class_f1(truth, answered, len(labels)).to_json(),
        "ece": metrics.ece([confidence for confidence, _ in sure], [hit for _, hit in sure]),
        "label_mass": statistics.median(masses) if masses else None,
        "unsure": sum(bool(answer.get("unsure")) for answer in answers) / len(answers),
    }
    return ScoredModel(report, [float(hit) for hit in hits])


def _objects(adapter: Adapter, rows: Sequence[DatasetRow], results: Sequence[GradedRow]) -> ScoredModel:
    names = list((adapter.schema or {}).get("properties", {}))
    graded = [_grade(adapter, names, row, result) for row, result in zip(rows, results, strict=True)]
    counts = np.array([[one.counts[name] for name in names] for one in graded])
    f1 = metrics.overlap(counts[:, :, 0], counts[:, :, 1], counts[:, :, 2])
    sure = [pair for one in graded for pair in one.sure]
    values = sum(one.values for one in graded)
    exact = [[one.exact[name] for name in names] for one in graded]
    report = {
        "field_exactness": metrics.mean([statistics.fmean(row) for row in exact]).to_json(),
        "object_exactness": metrics.share(sum(all(row) for row in exact), len(exact)).to_json(),
        "micro_f1": f1.micro.to_json(),
        "macro_f1": f1.macro.to_json(),
        "precision": f1.precision,
        "recall": f1.recall,
        "ece": metrics.ece([confidence for confidence, _ in sure], [hit for _, hit in sure]),
        "values": values,
        "not_in_text": sum(one.missing for one in graded) / values if values else 0.0,
        "fields": {
            name: metrics.share(sum(row[place] for row in exact), len(exact)).to_json()
            for place, name in enumerate(names)
        },
    }
    if adapter.form == "answers":
        report["token_f1"] = metrics.mean([one.token_f1 for one in graded]).to_json()
    return ScoredModel(report, [statistics.fmean(row) for row in exact])


@dataclass(frozen=True, slots=True)
class _Grade:
    exact: Mapping[str, bool]
    """Field -> whether all its values are as they should be, letter for letter."""
    counts: Mapping[str, tuple[int, int, int]]
    """Field -> values that are right, said, there; case and punctuation at the edges do not count."""
    sure: Sequence[tuple[float, bool]]
    values: int
    missing: int
    token_f1: float


def _grade(adapter: Adapter, names: Sequence[str], row: DatasetRow, result: GradedRow) -> _Grade:
    found = result.said.get("object") or {}
    confidence = result.said.get("confidence") or {}
    exact, counts, sure = {}, {}, []
    for name in names:
        said, right = _values(found.get(name)), list(row.right.get(name, ()))
        if adapter.form == "answers":
            right = [one for one in right if _folded(one) in {_folded(each) for each in said}][:1] or right[:1]
        folded, wanted = {_folded(one) for one in said}, {_folded(one) for one in right}
        exact[name] = result.error is None and {_plain(one) for one in said} == {_plain(one) for one in right}
        counts[name] = (len(folded & wanted), len(folded), len(wanted))
        shares = [share for place, share in confidence.items() if place == f"/{name}" or place.startswith(f"/{name}/")]
        if said and len(shares) == len(said):
            sure += [(share, _folded(one) in wanted) for share, one in zip(shares, said, strict=True)]
    said_all = sum(len(_values(found.get(name))) for name in names)
    missing = len(result.said.get("not_in_text") or ())
    token_f1 = _token_f1(found.get(ANSWER), row.right.get(ANSWER, ())) if adapter.form == "answers" else 0.0
    return _Grade(exact, counts, sure, said_all, missing, token_f1)


def _values(value: Any) -> list[str]:
    rows = value if isinstance(value, list) else [value]
    return [str(row) for row in rows if row not in (None, "")]


def _plain(text: str) -> str:
    return " ".join(text.split())


def _folded(text: str) -> str:
    return _plain(text).casefold().strip(_EDGES)


def _token_f1(said: Any, right: Sequence[str]) -> float:
    """The best overlap in words with any right answer."""
    words = Counter(_folded(str(said or "")).split())
    best = 0.0
    for one in right:
        wanted = Counter(_folded(one).split())
        common = sum((words & wanted).values())
        best = max(best, 2 * common / max(1, words.total() + wanted.total()))
    return best
