"""The promise about the detector of personal data, kept on the evaluation data."""

from collections import Counter

from appliance.config.route_rules import STRUCTURED
from scripts.benchmarks.privacy import ANNOTATED, KIND_OF, NEGATIVE, bound_share, is_tuning, read, tally
from tests.evaldata import evaluation_data


def test_structured_identifiers_are_found_and_little_else_is() -> None:
    folder = evaluation_data()
    rows = [row for name in ANNOTATED for row in read(folder / name) if not is_tuning(row)]
    total = found = 0
    for name, one in tally(rows)[0].items():
        if KIND_OF[name] in STRUCTURED:
            total, found = total + one.total, found + one.found
    assert total > 200
    assert found / total >= 0.95
    negatives = read(folder / NEGATIVE)
    share, kinds, _ = bound_share(negatives, STRUCTURED)
    assert len(negatives) == 500
    assert share < 0.02, kinds
    assert isinstance(kinds, Counter)
