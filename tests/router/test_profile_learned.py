"""The learned profiler: bounded features, weights that fit the code, and sense on requests written by hand."""

import io
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from appliance.core import Task
from appliance.errors import ConfigError
from appliance.router.profile import check_profiler, linear_model, profile_request
from appliance.router.profile.features import BUCKETS, MAX_FEATURES, extract_features
from appliance.router.profile.linear_model import (
    COLUMNS,
    LinearWeights,
    compute_complexity,
    feature_name,
    load_shipped_weights,
    read_weights,
    write_weights,
)
from appliance.router.profile.text_sample import take_sample
from scripts.train_profile import WEIGHTS_PATH, made_rows, train
from tests.router.profile_prompts import PROMPTS
from tests.router.scene import request_of

FORBIDDEN = {"agnews", "sroie", "xquad_en"}
GOLDEN = [17, 3847, 6305, 7623, 8208, 14471, 15509, 16022, 16452, 17615, 23331, 26665, 30017]


def learned_task(text: str) -> Task:
    return profile_request(request_of(text), prompt_tokens=20, output_tokens=None, profiler="learned").task


@pytest.mark.parametrize(
    "text", ["word " * 2000, "x1 ?" * 500_000, "漢字かな " * 500_000, ",.-" * 700_000, "a" * 2_000_000]
)
def test_a_text_of_any_length_gives_a_bounded_number_of_features(text: str) -> None:
    buckets = extract_features(text).buckets
    assert 0 < len(buckets) <= MAX_FEATURES
    assert buckets.min() >= 0 and buckets.max() < BUCKETS
    assert all(one < other for one, other in pairwise(buckets.tolist()))


def test_the_middle_of_two_megabytes_is_not_looked_at() -> None:
    start, end = "Sort these words. " * 200, "Thank you. " * 200
    one = extract_features(start + "aaa " * 500_000 + end)
    other = extract_features(start + "bbb " * 500_000 + end)
    assert np.array_equal(one.buckets, other.buckets)
    assert one.log_words == other.log_words > extract_features(start + end).log_words


def test_features_are_the_same_on_every_machine_and_in_every_process() -> None:
    """Weights are worth nothing where a text has other features: changing these numbers means FEATURE_VERSION too."""
    assert extract_features("Solve 3x = 12, please!").buckets.tolist() == GOLDEN


def test_a_word_counts_the_same_wherever_it_stands_and_whatever_its_digits_are() -> None:
    assert np.array_equal(extract_features("order 17").buckets, extract_features("  ORDER\n42 ").buckets)
    assert not np.array_equal(extract_features("order 17").buckets, extract_features("order 170").buckets)
    assert not np.array_equal(extract_features("dog bites man").buckets, extract_features("man bites dog").buckets)


@pytest.mark.parametrize("text", ["", "   ", "\n\t", "\ud800\x00", "🙂"])
def test_an_odd_text_has_a_profile(text: str) -> None:
    made = profile_request(request_of(text), prompt_tokens=1, output_tokens=None, profiler="learned")
    assert 0 <= made.complexity <= 1


def test_the_shipped_weights_are_small_and_belong_to_this_code() -> None:
    assert WEIGHTS_PATH.stat().st_size < 5_000_000
    weights = load_shipped_weights()
    assert weights.about["features"] == feature_name()
    assert weights.table.shape == (BUCKETS, len(COLUMNS))
    assert np.isfinite(weights.table).all() and np.isfinite(weights.marks).all()


def test_the_shipped_weights_name_what_they_were_learned_from_and_nothing_of_it_forbids_that() -> None:
    sources = {one["name"]: one for one in load_shipped_weights().about["sources"]}
    assert not FORBIDDEN & set(sources)
    assert all(one["licence"] and one["texts"] > 0 for one in sources.values())


def _saved(weights: LinearWeights) -> io.BytesIO:
    file = io.BytesIO()
    write_weights(file, weights)
    file.seek(0)
    return file


def test_saved_weights_are_read_as_they_were_and_saved_alike() -> None:
    shipped = load_shipped_weights()
    first = _saved(shipped)
    redecide = read_weights(first)
    assert np.array_equal(redecide.table, shipped.table) and np.array_equal(redecide.marks, shipped.marks)
    assert redecide.difficulty_scale == pytest.approx(shipped.difficulty_scale)
    assert first.getvalue() == _saved(redecide).getvalue()


def test_weights_of_another_version_or_damaged_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = _saved(load_shipped_weights())
    monkeypatch.setattr(linear_model, "FEATURE_VERSION", 999)
    with pytest.raises(ValueError, match="features"):
        read_weights(saved)
    monkeypatch.undo()
    saved.seek(0)
    with np.load(saved, allow_pickle=False) as arrays:
        kept = {name: arrays[name] for name in arrays.files}
    kept["rest"][3] += 1
    broken = io.BytesIO()
    np.savez(broken, **kept)
    broken.seek(0)
    with pytest.raises(ValueError, match="damaged"):
        read_weights(broken)


def test_weights_that_are_not_there_are_said_at_once_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_model, "FILE", "no-such-weights.npz")
    load_shipped_weights.cache_clear()
    try:
        with pytest.raises(ConfigError, match='profiler = "rules"'):
            check_profiler("learned")
        check_profiler("rules")
        check_profiler("llm")
    finally:
        load_shipped_weights.cache_clear()


@pytest.mark.parametrize("size", [0, 10, 1000, 400_000])
def test_weights_that_were_cut_off_are_a_mistake_of_the_configuration(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / linear_model.FILE).write_bytes(WEIGHTS_PATH.read_bytes()[:size])
    monkeypatch.setattr(linear_model, "files", lambda package: tmp_path)
    load_shipped_weights.cache_clear()
    try:
        with pytest.raises(ConfigError, match="cannot be used"):
            load_shipped_weights()
    finally:
        load_shipped_weights.cache_clear()


def test_nothing_in_a_file_of_weights_is_ever_unpickled() -> None:
    file = io.BytesIO()
    np.savez(file, table=np.array([{"a": 1}], dtype=object), rest=np.zeros(1), about=np.zeros(1, np.uint8))
    file.seek(0)
    with pytest.raises(ValueError):
        read_weights(file)


def test_nine_in_ten_requests_written_by_hand_get_the_task_a_person_would_name() -> None:
    wrong = [(task, learned_task(text), text) for text, task in PROMPTS if learned_task(text) != task]
    assert len(wrong) <= len(PROMPTS) // 10, wrong


def test_every_task_is_found_among_the_requests_written_by_hand() -> None:
    found = {learned_task(text) for text, task in PROMPTS if learned_task(text) == task}
    assert found == set(linear_model.TASKS)


@pytest.mark.parametrize(
    ("fields", "task"), [({"endpoint": "decisions"}, "classification"), ({"format": "tools"}, "tool_use")]
)
def test_endpoint_and_format_are_believed_before_the_weights(fields: dict[str, str], task: Task) -> None:
    asked = request_of("Prove the theorem", **fields)
    assert profile_request(asked, prompt_tokens=5, output_tokens=1, profiler="learned").task == task


def test_labels_are_never_complex_and_difficulty_keeps_its_order_within_a_task() -> None:
    assert compute_complexity("classification", 50.0) < 0.25
    steps = [compute_complexity("reasoning", difficulty) for difficulty in (-3, -1, -0.5, 0, 0.5, 1, 3)]
    assert steps == sorted(steps) and len(set(steps)) == len(steps)
    assert steps[0] < 0.7 < steps[3] <= 1.0


def test_a_longer_problem_is_harder() -> None:
    short = "A box holds 3 pens and 4 pencils. How many things are in 2 boxes?"
    long = short.replace(
        "How many", "Tom adds 5 rubbers, then takes 2 pens out of each, and gives a third away. " * 6 + "How many"
    )
    one, other = (
        profile_request(request_of(text), prompt_tokens=30, output_tokens=None, profiler="learned")
        for text in (short, long)
    )
    assert one.task == other.task == "reasoning"
    assert one.complexity < other.complexity


def test_training_twice_on_the_same_rows_gives_the_same_file_and_learns_them() -> None:
    rows = [replace(row, gain=float(len(row.text) > 100)) for row in made_rows()[::15]]
    weights = train(rows)
    assert _saved(weights).getvalue() == _saved(train(rows)).getvalue()
    spoiled = train([replace(row, task="chat") for row in rows])
    asked = "Translate the following text to Dutch.\n\nThe mill was built in spring."
    assert _first(weights, asked) == "translation"
    assert _first(spoiled, asked) == "chat"


def _first(weights: LinearWeights, text: str) -> Task:
    scores = linear_model.score_features(text, take_sample(text), weights).tasks
    return linear_model.TASKS[int(np.argmax(scores))]
