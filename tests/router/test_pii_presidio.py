"""Presidio beside the patterns; only where it is installed. A blank pipeline that knows one name stands for a model."""

import socket
from pathlib import Path
from typing import Any

import pytest

from appliance.core import PersonalKind
from appliance.errors import ConfigError

pytest.importorskip("presidio_analyzer", reason="presidio-analyzer is not installed")

KINDS: tuple[PersonalKind, ...] = ("person_name", "email", "payment_card", "phone")


@pytest.fixture
def pipeline(tmp_path: Path) -> str:
    import spacy

    blank: Any = spacy.blank("en")
    ruler = blank.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "PERSON", "pattern": [{"LOWER": "ada"}, {"LOWER": "lovelace"}]}])
    blank.to_disk(tmp_path / "model")
    return str(tmp_path / "model")


def test_names_come_from_the_model_the_rest_from_patterns_and_nothing_is_fetched(
    pipeline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from appliance.router.pii.presidio import PresidioDetector

    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **_: asked.append(arguments))
    detector = PresidioDetector(KINDS, pipeline, "en")
    assert detector.kinds_in("I met Ada Lovelace") == ("person_name",)
    assert detector.kinds_in("jane@example.com and 4111 1111 1111 1111") == ("email", "payment_card")
    assert detector.kinds_in("nothing in it") == ()
    assert asked == []


def test_without_a_model_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import spacy.util

    from appliance.router.pii.presidio import best_pipeline, make

    monkeypatch.setattr(spacy.util, "get_installed_models", list)
    with pytest.raises(ConfigError, match="en_core_web_lg"):
        make(KINDS)
    assert best_pipeline(["en_core_web_sm", "en_core_web_lg", "de_core_news_md"]) == "en_core_web_lg"
