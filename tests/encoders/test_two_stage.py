"""Two steps in one classifier: the encoder is asked about what words leave unsure, and no more than it takes."""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from appliance.encoders.embedders import _BATCH_TOKENS, _RUN_TOKENS, Embedded, _batches, normalise_rows
from appliance.encoders.store import ClassifierStore
from appliance.encoders.training.examples import read_examples
from appliance.encoders.training.fitting import fit_calibrations
from appliance.encoders.training.metrics import compute_ece
from appliance.encoders.training.trainer import CandidateModels, Trainer, train_classifier
from appliance.encoders.two_stage import (
    TrainedClassifier,
    calibrate_probabilities,
    choose_escalation,
    compute_margins,
    tabulate_accuracy_by_share,
)
from appliance.errors import ModelFileError
from tests.encoders.samples import labelled

Floats = npt.NDArray[np.float32]
EXAMPLES = labelled(240, unclear=0.4)


class Knowing:
    """An encoder that sees every text's label, as far as `clear` texts go; the others' vectors are noise."""

    name, dimensions, max_tokens, fingerprint, steps = "knowing", 8, 512, "knowing:8", 0

    def __init__(self, rows: Sequence[dict[str, str]]) -> None:
        self._labels = {row["text"]: row["label"] for row in rows}
        self.asked: list[str] = []

    def embed(self, texts: Sequence[str], *, truncate: bool = False) -> Embedded:
        self.asked += texts
        rows = np.zeros((len(texts), 8), dtype=np.float32)
        for place, text in enumerate(texts):
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
            rows[place] = np.random.default_rng(seed).normal(size=8) / 4
            rows[place, ["delivery", "billing", "login"].index(self._labels[text])] += 1
        return Embedded(normalise_rows(rows), [1] * len(texts))


def trained(encoder: Knowing, wanted: float | None, bench: Trainer | None = None) -> TrainedClassifier:
    return train_classifier(
        read_examples(EXAMPLES, None, None),
        CandidateModels(None, encoder),
        wanted_accuracy=wanted,
        max_tier="encoder",
        progress=lambda step, share: None,
        clock=time.monotonic,
        trainer=bench,
    )


def test_the_encoder_is_asked_about_as_few_texts_as_reach_the_accuracy(tmp_path: Path) -> None:
    fresh = labelled(120, seed=4, unclear=0.4)
    encoder = Knowing([*EXAMPLES, *fresh])
    bench = Trainer(read_examples(EXAMPLES, None, None), CandidateModels(None, encoder))
    words, some, most = (trained(encoder, wanted, bench) for wanted in (0.5, 0.8, 0.99))
    assert words.second is None and words.report["asked_share"] == 0
    assert some.second is not None and some.report["accuracy"] >= 0.8
    assert 0 < some.report["asked_share"] < most.report["asked_share"] < 1
    assert most.report["accuracy"] > some.report["accuracy"]
    assert "; where unsure encoder" in some.report["recipe"]

    store = ClassifierStore(tmp_path)
    store.save("mail", some, made_at="2026-01-01T00:00:00+00:00", models={"encoder": encoder.fingerprint})
    head = store.load("mail", None, None, {"knowing": encoder})
    encoder.asked.clear()
    texts = [row["text"] for row in fresh]
    found = head.answer(texts)
    assert encoder.asked == [text for text, was_asked in zip(texts, found.escalated, strict=True) if was_asked]
    assert 0 < found.escalated.sum() < len(texts) / 2
    assert found.probabilities.sum(axis=1) == pytest.approx(np.ones(len(texts)), abs=1e-4)
    np.testing.assert_allclose(found.probabilities, some.head(encoder).answer(texts).probabilities, atol=1e-5)
    with pytest.raises(ModelFileError, match="pull knowing again"):
        store.load("mail", None, None, {})


def test_without_a_wanted_accuracy_nearly_all_that_the_encoder_brings_is_taken() -> None:
    encoder = Knowing(EXAMPLES)
    told = trained(encoder, None).report
    best = max(row["accuracy"] for row in told["tried"])
    assert told["accuracy"] >= best - 0.005 and told["asked_share"] < 1
    assert [row["asked_share"] for row in told["accuracy_by_share"]][::8] == [0.0, 1.0]


def scores(chance: np.random.Generator, truth: npt.NDArray[np.int64], strength: npt.ArrayLike) -> Floats:
    made: Floats = chance.normal(size=(truth.size, 4)).astype(np.float32)
    made[np.arange(truth.size), truth] += np.asarray(strength, dtype=np.float32)
    return made


def test_answers_of_both_steps_together_are_calibrated() -> None:
    chance = np.random.default_rng(0)
    truth = chance.integers(0, 4, 8_000)
    hard = chance.random(8_000) < 0.3
    first = scores(chance, truth, np.where(hard, 0.5, 4.0)) * np.float32(5)
    second = scores(chance, truth, np.where(hard, 2.0, 4.0)) / np.float32(3)
    half = np.arange(8_000) < 4_000
    asking = choose_escalation(first[half], second[half], truth[half], 0.9)
    asked = compute_margins(first) < asking.below
    found = fit_calibrations(first[half], second[half], asked[half], truth[half])
    shares = calibrate_probabilities(found, first[~half], second[~half], asked[~half])
    right = shares.argmax(axis=1) == truth[~half]
    assert right.mean() == pytest.approx(asking.accuracy, abs=0.02)
    assert compute_ece(shares.max(axis=1), right) < 0.02


def test_an_accuracy_out_of_reach_gets_what_comes_closest() -> None:
    chance = np.random.default_rng(1)
    truth = chance.integers(0, 4, 2_000)
    first, second = (scores(chance, truth, np.full(2_000, 2.0)) for _ in range(2))
    closest = choose_escalation(first, second, truth, 0.999)
    shown = tabulate_accuracy_by_share(first, second, truth)
    assert closest.accuracy >= max(row["accuracy"] for row in shown)
    assert choose_escalation(first, second, truth, 0.1).share == 0.0


def test_texts_of_like_length_are_computed_together_and_little_is_padded() -> None:
    lengths = [*np.random.default_rng(0).integers(3, 90, 300).tolist(), 512, 512]
    batches = [[lengths[place] for place in places] for places in _batches(lengths)]
    assert sorted(length for batch in batches for length in batch) == sorted(lengths)
    assert all(len(batch) * max(batch) <= _BATCH_TOKENS for batch in batches)
    assert all(len(batch) * max(batch) - sum(batch) <= _RUN_TOKENS for batch in batches)
