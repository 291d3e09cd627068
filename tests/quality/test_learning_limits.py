"""What one caller sends must neither fill the memory nor keep a classifier from learning."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from appliance.config import LearningSettings as LearningRules
from appliance.encoders.training.examples import MAX_TEXT_CHARS
from appliance.quality.learning import CascadeLearning
from appliance.quality.store import LearningStore
from appliance.tasks.classify.cascade import CascadeCall, CascadeText

pytestmark = pytest.mark.anyio
TARGET = "classifier/mail"


class Nobody:
    async def ask(self, method: str, path: str, body: bytes = b"") -> Any:
        raise AssertionError("nothing is to be asked")

    def warn(self, code: str, text: str, about: str = "") -> None: ...

    def clear(self, code: str, about: str = "") -> None: ...


def call(number: int, text: str) -> CascadeCall:
    row: Mapping[str, Any] = {"own": "a", "classifier_confidence": 0.5, "answer": "b", "answered_by": "cloud/big"}
    seen = CascadeText(
        index=0, text=text, is_sure=True, went_on=True, audited=False, is_reference=True, capped=False, **row
    )
    return CascadeCall("r", TARGET, "1", f"dec_{number}", "ann", "any", keep_texts=True, at=1.0, rows=(seen,))


async def learning(folder: Path) -> CascadeLearning:
    nobody = Nobody()
    store = await LearningStore.open(folder / "learning.sqlite")
    return CascadeLearning(store, nobody, dict, nobody, LearningRules(), lambda: 1.0)


async def test_texts_that_no_training_takes_are_not_kept(tmp_path: Path) -> None:
    learns = await learning(tmp_path)
    for number, text in enumerate(("good", "x" * MAX_TEXT_CHARS, "x" * (MAX_TEXT_CHARS + 1), " \n")):
        learns.record_cascade(call(number, text))
    await learns.run_round()
    assert (await learns.store.count_labels(TARGET))["labels"] == 4
    assert [len(row.text or "") for row in await learns.store.list_texts(TARGET, ["ann"])] == [4, MAX_TEXT_CHARS]
    await learns.aclose()


async def test_the_log_tells_no_text_however_much_it_tells(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="sqlalchemy.engine"):
        learns = await learning(tmp_path)
        learns.record_cascade(call(1, "a text of somebody's"))
        await learns.run_round()
        await learns.aclose()
    assert "INSERT INTO labelled" in caplog.text
    assert "somebody" not in caplog.text


async def test_what_is_remembered_for_feedback_is_bounded_by_length_too(tmp_path: Path) -> None:
    learns = await learning(tmp_path)
    for number in range(1_500):
        learns.record_cascade(call(number, "x" * MAX_TEXT_CHARS))
    held = sum(len(row.text) for one in learns._recent.calls.values() for row in one.rows)
    assert held == 20_000_000
    await learns.forget_owner("ann")
    assert (learns._recent.texts, learns._recent.characters) == (0, 0)
    await learns.aclose()
