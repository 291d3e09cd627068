"""Probabilities sum to one, and a field's confidence is that of the tokens it was written with."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.tasks.decisions.confidence import (
    calibrate_scores,
    compute_expected_level,
    find_most_likely,
    measure_field_confidence,
)
from appliance.tasks.extract.value_spans import find_value_spans

LOGPROBS = st.lists(st.floats(-50, 0), min_size=2, max_size=255)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(LOGPROBS)
def test_probabilities_sum_to_one_and_keep_the_order(logprobs: list[float]) -> None:
    shares = calibrate_scores(logprobs)
    assert math.isclose(sum(shares), 1.0)
    assert logprobs[find_most_likely(shares)] == pytest.approx(max(logprobs))


def test_a_temperature_flattens_and_sharpens() -> None:
    plain = calibrate_scores([-1.0, -2.0])
    assert calibrate_scores([-1.0, -2.0], 2.0)[0] < plain[0] < calibrate_scores([-1.0, -2.0], 0.5)[0]


def test_an_excluded_label_has_no_probability_and_not_all_may_be_excluded() -> None:
    assert calibrate_scores([-math.inf, -1.0]) == (0.0, 1.0)
    with pytest.raises(ValueError, match="finite"):
        calibrate_scores([-math.inf, -math.inf])


def test_a_score_lies_between_its_levels() -> None:
    assert compute_expected_level((0.25, 0.25, 0.5)) == pytest.approx(1.25)


@given(JSON)
def test_every_leaf_of_any_json_is_found_where_it_stands(value: object) -> None:
    import json

    for text in (json.dumps(value), json.dumps(value, indent=1, ensure_ascii=False)):
        for pointer, (start, end) in find_value_spans(text).items():
            found = value
            for key in pointer.split("/")[1:]:
                key = key.replace("~1", "/").replace("~0", "~")
                found = found[int(key)] if isinstance(found, list) else found[key]  # type: ignore[index]
            assert json.loads(text[start:end]) == found


def row(token: str, probability: float) -> dict[str, object]:
    return {"token": token, "logprob": math.log(probability), "bytes": list(token.encode())}


def test_a_fields_confidence_is_the_product_over_its_tokens_alone() -> None:
    tokens = [
        ("{", 0.1),
        ('"name"', 0.2),
        (':"', 0.9),
        ("Än", 0.5),
        ("na", 0.8),
        ('","', 1.0),
        ("age", 0.3),
        ('":', 0.4),
    ]
    tokens += [("4", 0.7), ("2", 0.6), ("}", 0.1)]
    content = "".join(token for token, _ in tokens)
    confidence = measure_field_confidence(content, {"content": [row(*token) for token in tokens]})
    assert confidence is not None
    assert confidence["/name"] == pytest.approx(0.9 * 0.5 * 0.8 * 1.0)
    assert confidence["/age"] == pytest.approx(0.7 * 0.6)


def test_a_character_cut_between_tokens_is_put_together_by_its_bytes() -> None:
    rows = [
        {"token": '{"a":"\ufffd', "logprob": -1.0, "bytes": [*b'{"a":"', 0xC3]},
        {"token": '\ufffd"}', "logprob": -2.0, "bytes": [0x84, *b'"}']},
    ]
    confidence = measure_field_confidence('{"a":"Ä"}', {"content": rows})
    assert confidence is not None and confidence["/a"] == pytest.approx(math.exp(-3.0))


@pytest.mark.parametrize(
    "logprobs",
    [None, {}, {"content": None}, {"content": []}, {"content": [5]}, {"content": [{"token": "{}", "logprob": None}]}],
)
def test_without_token_probabilities_there_is_no_confidence(logprobs: object) -> None:
    assert measure_field_confidence('{"a":1}', logprobs) is None


def test_tokens_that_spell_something_else_give_no_confidence() -> None:
    assert measure_field_confidence('{"a":1}', {"content": [row('{"a":2}', 0.5)]}) is None
