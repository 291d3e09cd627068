"""Train the learned profiler's weights: python -m scripts.train_profile --data DIR/routing [--out FILE]

Ridge regression on hashed features, solved by conjugate gradients: numpy alone, a minute on one core, and the same rows
give the same weights. One text in five (by hash) is never learned from; the figures that go into the file are measured
on those, and, harder, by models that were trained without the data set they are tested on.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from appliance.core import Task
from appliance.router.profile.features import BUCKETS, extract_features
from appliance.router.profile.linear_model import COLUMNS, FILE, MARKS, TASKS, LinearWeights, list_marks, write_weights
from appliance.router.profile.text_sample import take_sample
from scripts.profile_data import KIN, LICENCES, Row, may_train, read_rows
from scripts.profile_templates import made_requests

WEIGHTS_PATH: Final = Path(__file__).parents[1] / "appliance" / "router" / "profile" / FILE

_MADE_PER_TASK: Final = 240
_SEED: Final = 20
_TASK_RIDGE: Final = 3.0
_MARK_RIDGE: Final = 1.0
_GAIN_RIDGE: Final = 40.0
_GAIN_SHARE: Final = 0.5
"""How much of the learned gain is believed. On data of another kind it helps at a half and harms at the whole."""
_LENGTH_GAIN: Final = 0.04
"""Gain for one standard deviation of log length: the one sign of difficulty that held on every data set."""
_MOST_OF_A_KIND: Final = 600
"""Rows of one source and task beyond this many share their weight."""
_STEPS: Final = 40

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of features, each of length one after rarity was multiplied in."""

    rows: int
    row: NDArray[np.int64]
    column: NDArray[np.int64]
    value: Vector

    marks: Vector
    """[rows, marks]: a few dense columns after the hashed ones."""

    def times(self, weights: Vector) -> Vector:
        hashed = np.bincount(self.row, self.value * weights[self.column], self.rows)
        return hashed + self.marks @ weights[BUCKETS:]

    def transposed_times(self, values: Vector) -> Vector:
        hashed = np.bincount(self.column, self.value * values[self.row], BUCKETS)
        return np.concatenate((hashed, self.marks.T @ values))


def train(rows: Sequence[Row]) -> LinearWeights:
    """Weights from `rows` alone: those with a task teach the task, those with a gain the difficulty."""
    features = [extract_features(row.text) for row in rows]
    buckets = [one.buckets for one in features]
    documents = np.bincount(np.concatenate(buckets), minlength=BUCKETS)
    rarity = np.maximum(np.log((1 + len(rows)) / (1 + documents)), 0.0)
    table = np.zeros((BUCKETS, len(COLUMNS)))
    table[:, -1] = rarity
    with_task = [index for index, row in enumerate(rows) if row.task is not None]
    marks = np.array([list_marks(take_sample(rows[index].text)) for index in with_task], np.float64)
    matrix = _matrix([buckets[index] for index in with_task], rarity, marks)
    tasks = [rows[index].task for index in with_task]
    importance = _importance([(rows[index].source, rows[index].task) for index in with_task], tasks)
    offsets, of_marks = np.zeros(len(TASKS)), np.zeros((len(MARKS), len(TASKS)))
    for number, task in enumerate(TASKS):
        wanted = np.array([1.0 if one == task else -1.0 for one in tasks])
        offsets[number] = np.average(wanted, weights=importance)
        solved = _ridge(matrix, wanted - offsets[number], importance, _TASK_RIDGE)
        table[:, number] = solved[:BUCKETS] * rarity
        of_marks[:, number] = solved[BUCKETS:]
    log_words = np.array([one.log_words for one in features])
    length_weight = _LENGTH_GAIN / float(log_words.std())
    length_offset = float(log_words.mean())
    measured = [index for index, row in enumerate(rows) if row.gain is not None]
    lengths = length_weight * (log_words[measured] - length_offset)
    wanted = _within_kinds([rows[index] for index in measured]) - lengths
    matrix = _matrix([buckets[index] for index in measured], rarity, np.zeros((len(measured), 0)))
    learned = _GAIN_SHARE * _ridge(matrix, wanted, np.ones(len(measured)), _GAIN_RIDGE)
    table[:, -2] = learned * rarity
    return LinearWeights(
        table=table.astype(np.float16).astype(np.float32),
        marks=of_marks.astype(np.float32),
        offsets=offsets.astype(np.float32),
        length_weight=length_weight,
        length_offset=length_offset,
        difficulty_scale=float((matrix.times(learned) + lengths).std()),
        about={},
    )


def _matrix(buckets: Sequence[NDArray[np.int64]], rarity: Vector, marks: Vector) -> Matrix:
    row = np.repeat(np.arange(len(buckets)), [len(one) for one in buckets])
    column = np.concatenate(buckets)
    value = rarity[column]
    norms = np.sqrt(np.bincount(row, value * value, len(buckets)) + 1e-9)
    return Matrix(len(buckets), row, column, value / norms[row], marks)


def _ridge(matrix: Matrix, wanted: Vector, importance: Vector, ridge: float) -> Vector:
    """argmin of sum(importance * (matrix w - wanted)^2) + ridge * |w|^2, by conjugate gradients."""
    weights = np.zeros(BUCKETS + matrix.marks.shape[1])
    penalty = np.full(len(weights), ridge)
    penalty[BUCKETS:] = _MARK_RIDGE
    residual = matrix.transposed_times(importance * wanted)
    direction, size = residual.copy(), float(residual @ residual)
    enough = 1e-8 * size
    for _ in range(_STEPS):
        if size <= enough:
            break
        image = matrix.transposed_times(importance * matrix.times(direction)) + penalty * direction
        step = size / float(direction @ image)
        weights += step * direction
        residual -= step * image
        size, last = float(residual @ residual), size
        direction = residual + size / last * direction
    return weights


def _importance(kinds: Sequence[tuple[str, Task | None]], tasks: Sequence[Task | None]) -> Vector:
    """No source outweighs the others, and no task does."""
    of_kind = Counter(kinds)
    each = np.array([min(1.0, _MOST_OF_A_KIND / of_kind[kind]) for kind in kinds])
    of_task: Counter[Task | None] = Counter()
    for task, weight in zip(tasks, each, strict=True):
        of_task[task] += weight
    mean = sum(of_task.values()) / len(of_task)
    by_task: Vector = np.array([mean / of_task[task] for task in tasks])
    return each * by_task


def _within_kinds(rows: Sequence[Row]) -> Vector:
    """Gains less the mean of their kind: what a data set is about must not pass for how hard its questions are."""
    gains: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        gains.setdefault((row.dataset, row.kind), []).append(row.gain or 0.0)
    means = {kind: float(np.mean(values)) for kind, values in gains.items()}
    return np.array([(row.gain or 0.0) - means[row.dataset, row.kind] for row in rows])


def made_rows() -> list[Row]:
    return [Row("made", "made", task, text, task) for text, task in made_requests(_MADE_PER_TASK, _SEED)]


def training_rows(rows: Iterable[Row]) -> list[Row]:
    """What the shipped weights are trained on: licensed, not for tests, each text once, and our own templates."""
    kept = {row.text: row for row in rows if may_train(row) and not _is_copy(row)}
    return [*kept.values(), *made_rows()]


def without(rows: Iterable[Row], dataset: str) -> list[Row]:
    """Rows to train on for a test on all of `dataset`: nothing of it, and nothing of its kind elsewhere."""
    kin = KIN[dataset]
    left = [
        row
        for row in rows
        if row.source in LICENCES and row.dataset != dataset and row.source != dataset and row.kind not in kin
    ]
    return [*{row.text: row for row in left}.values(), *made_rows()]


def _is_copy(row: Row) -> bool:
    """Rows of the mixed file that stand in another file too."""
    return row.dataset == "mixed" and row.source in ("llmrouter", "mtbench")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder with the routing data")
    parser.add_argument("--out", type=Path, default=WEIGHTS_PATH)
    options = parser.parse_args()
    rows = training_rows(read_rows(options.data))
    weights = replace(train(rows), about=_about(rows))
    with options.out.open("wb") as file:
        write_weights(file, weights)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB from {len(rows)} texts", file=sys.stderr)


def _about(rows: Sequence[Row]) -> dict[str, Any]:
    sources = Counter(row.source for row in rows)
    return {
        "sources": [
            {"name": name, "licence": LICENCES.get(name, "written for this project"), "texts": count}
            for name, count in sorted(sources.items())
        ],
        "split": "one text in five, by a hash of its last 400 characters, was not learned from",
    }


if __name__ == "__main__":
    main()
