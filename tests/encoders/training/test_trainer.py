"""Training on words alone: what is reported holds on new rows, and serving computes what was trained."""

import errno
import time
from pathlib import Path

import numpy as np
import pytest

from appliance.encoders import store as classifier_store
from appliance.encoders.features import FeatureVocabulary, split_words
from appliance.encoders.linear_models import (
    RECIPES,
    LinearModel,
    LinearScorer,
    compute_softmax,
    name_blocks,
    split_weights,
    stack_blocks,
)
from appliance.encoders.store import ClassifierStore
from appliance.encoders.training.examples import read_examples
from appliance.encoders.training.fitting import fit_calibration, fit_linear, fit_temperature
from appliance.encoders.training.metrics import compute_ece
from appliance.encoders.training.trainer import CandidateModels, train_classifier
from appliance.encoders.two_stage import TrainedClassifier
from appliance.errors import ModelFileError, NotFound, RequestError
from tests.encoders.samples import labelled

NO_MODELS = CandidateModels(None, None)


def trained(count: int = 150, unclear: float = 0.0, wanted: float | None = None) -> TrainedClassifier:
    return train_classifier(
        read_examples(labelled(count, unclear=unclear), None, None),
        NO_MODELS,
        wanted_accuracy=wanted,
        max_tier="encoder",
        progress=lambda step, share: None,
        clock=time.monotonic,
    )


def saved(store: ClassifierStore, made: TrainedClassifier, name: str = "mail") -> int:
    return store.save(name, made, made_at="2026-01-01T00:00:00+00:00", models={})


def test_words_are_cut_where_a_script_has_no_spaces() -> None:
    assert split_words("Don't PANIC!") == ["don", "'", "t", "panic", "!"]
    assert max(map(len, split_words("字" * 100))) == 32
    assert len(split_words("word " * 10_000)) == 512


def test_serving_gives_the_scores_that_were_trained_on() -> None:
    rows = labelled(80)
    texts, truth = [row["text"] for row in rows], np.array([ord(row["label"][0]) % 3 for row in rows])
    vocabulary = FeatureVocabulary.learn(texts, None)
    blocks = name_blocks(vocabulary.blocks(texts), None)
    recipe = RECIPES[0]
    weights, bias = fit_linear(stack_blocks(blocks, recipe), truth, 3, 1.0)
    scorer = LinearScorer(vocabulary, LinearModel(split_weights(weights, blocks, recipe), bias))
    new = [*texts[:20], "never seen words here", "", "parcel parcel parcel"]
    expected = stack_blocks(name_blocks(vocabulary.blocks(new), None), recipe) @ weights + bias
    for _ in range(2):  # the second time every word is remembered
        np.testing.assert_allclose(scorer.scores(new), expected, atol=1e-4)
    one_by_one = np.vstack([scorer.scores([text]) for text in new])
    np.testing.assert_allclose(one_by_one, expected, atol=1e-4)


def test_what_is_remembered_of_words_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.encoders.linear_models._TABLE_BYTES", 2_000)
    rows = [row["text"] for row in labelled(40)]
    vocabulary = FeatureVocabulary.learn(rows, None)
    blocks = name_blocks(vocabulary.blocks(rows), None)
    weights, bias = fit_linear(stack_blocks(blocks, RECIPES[0]), np.arange(40) % 3, 3, 1.0)
    scorer = LinearScorer(vocabulary, LinearModel(split_weights(weights, blocks, RECIPES[0]), bias))
    first = scorer.scores(rows[:5])
    for text in rows:
        scorer.scores([text])
    np.testing.assert_allclose(scorer.scores(rows[:5]), first, atol=1e-5)


def test_the_temperature_is_the_one_that_the_scores_were_made_with() -> None:
    chance = np.random.default_rng(0)
    scores = chance.normal(size=(4_000, 4)).astype(np.float32)
    shares = compute_softmax(scores, 0.5)
    truth = np.array([chance.choice(4, p=row / row.sum()) for row in shares.astype(np.float64)])
    assert fit_temperature(scores, truth) == pytest.approx(0.5, rel=0.1)


def test_calibration_mends_confidence_and_never_changes_the_order() -> None:
    chance = np.random.default_rng(1)
    scores = (chance.normal(size=(4_000, 5)) * 2).astype(np.float32)
    truth = np.array([chance.choice(5, p=row / row.sum()) for row in compute_softmax(scores, 1.3).astype(np.float64)])
    # Margins squared: what a temperature alone cannot mend.
    bent = (np.sign(scores) * scores**2).astype(np.float32)
    half = np.arange(4_000) < 2_000
    right = bent.argmax(axis=1) == truth
    found = fit_calibration(bent[half], truth[half])
    shares = found.probabilities(bent[~half])
    assert shares.sum(axis=1) == pytest.approx(np.ones(2_000), abs=1e-4)
    assert (shares.argmax(axis=1) == bent[~half].argmax(axis=1)).all()
    plain = compute_softmax(bent[~half], found.temperature)
    assert compute_ece(shares.max(axis=1), right[~half]) < min(0.03, compute_ece(plain.max(axis=1), right[~half]))


def test_a_report_holds_on_rows_that_were_not_trained_on(tmp_path: Path) -> None:
    store = ClassifierStore(tmp_path)
    made = trained(240, unclear=0.2)
    assert made.report["rows"] == 240
    saved(store, made)
    head = store.load("mail", None, None, {})
    fresh = labelled(400, seed=1, unclear=0.2)
    found = head.answer([row["text"] for row in fresh]).probabilities.argmax(axis=1)
    right = [head.labels[place] == row["label"] for place, row in zip(found, fresh, strict=True)]
    assert np.mean(right) == pytest.approx(made.report["accuracy"], abs=0.08)
    assert made.report["bounds"][-1]["local_share"] >= made.report["bounds"][0]["local_share"]


def test_an_accuracy_that_is_not_reached_is_said() -> None:
    told = trained(90, unclear=0.5, wanted=0.99).report
    assert told["reached"] is False
    assert "was asked for" in told["notes"][-1]


def test_versions_are_kept_and_one_call_goes_back(tmp_path: Path) -> None:
    store, made = ClassifierStore(tmp_path), trained(60)
    assert [saved(store, made), saved(store, made)] == [1, 2]
    assert store.find_serving("mail") == 2
    assert store.roll_back("mail", None) == 1
    assert store.find_serving("mail") == 1
    assert store.roll_back("mail", 2) == 2
    with pytest.raises(NotFound, match="it has 1, 2"):
        store.roll_back("mail", 9)
    held = store.read_held_out("mail")
    assert {"confidence", "right", "strangeness"} == set(held)
    assert len(held["right"]) == 60
    store.remove("mail")
    with pytest.raises(NotFound, match="no classifier 'mail'"):
        store.find_serving("mail")


def test_a_full_disk_leaves_what_serves_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, made = ClassifierStore(tmp_path), trained(60)
    saved(store, made)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(classifier_store, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        saved(store, made)
    assert (store.find_serving("mail"), store.list_versions("mail")) == (1, [1])
    assert [path.name for path in (tmp_path / "mail").iterdir() if path.name.endswith(".part")] == []
    monkeypatch.undo()
    assert saved(store, made) == 2


def test_damaged_files_say_what_to_do(tmp_path: Path) -> None:
    store = ClassifierStore(tmp_path)
    saved(store, trained(60))
    (tmp_path / "mail" / "v1" / "weights.safetensors").write_bytes(b"garbage")
    with pytest.raises(ModelFileError, match="roll back or train again"):
        store.load("mail", None, None, {})


@pytest.mark.parametrize("name", ["", "../up", "A", "a/b", "x" * 65, None])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(RequestError, match="it must be 1 to 64"):
        classifier_store.check_name(name)
