"""The same search, and Presidio's: its language model finds names and places, as patterns hardly do.

Needs `presidio-analyzer` and an installed spaCy pipeline. Nothing is downloaded: Presidio would fetch a missing
pipeline by itself, and its recognizers of e-mail addresses and URLs a list of domains, so those are never asked.
"""

from collections.abc import Collection, Mapping
from typing import Any, Final

import spacy.util
from presidio_analyzer import AnalyzerEngine
from presidio_analyzer.nlp_engine import NlpEngineProvider

from appliance.core import PersonalKind
from appliance.errors import ConfigError
from appliance.router.pii.patterns import PiiPatternDetector

_ENTITIES: Final[Mapping[str, PersonalKind]] = {
    "PERSON": "person_name",
    "LOCATION": "postal_address",
    "PHONE_NUMBER": "phone",
    "CREDIT_CARD": "payment_card",
    "IBAN_CODE": "iban",
    "CRYPTO": "crypto_wallet",
    "IP_ADDRESS": "ip_address",
    "MEDICAL_LICENSE": "medical_record",
    "US_SSN": "national_id",
    "US_ITIN": "national_id",
    "US_PASSPORT": "passport",
    "US_DRIVER_LICENSE": "driver_license",
    "UK_NHS": "national_id",
    "UK_NINO": "national_id",
}
_LEAST_SCORE: Final = 0.5
"""Below it Presidio itself calls a finding weak: digits without a word beside them."""
_SIZES: Final = ("_trf", "_lg", "_md", "_sm")


def make(kinds: Collection[PersonalKind]) -> "PresidioDetector":
    """Raises ConfigError where no language model is installed."""
    name = best_pipeline(spacy.util.get_installed_models())
    if name is None:
        raise ConfigError(
            "the detector 'presidio' needs a spaCy pipeline with named entities, and none is installed: install one "
            '(for example the package en_core_web_lg), or use detector = "patterns"',
            field="residency.detector",
        )
    return PresidioDetector(kinds, name)


def best_pipeline(names: Collection[str]) -> str | None:
    """The largest of the installed pipelines."""
    return min(names, key=_size, default=None)


def _size(name: str) -> int:
    return next((place for place, size in enumerate(_SIZES) if name.endswith(size)), len(_SIZES))


class PresidioDetector:
    """May be used by several threads. Takes milliseconds for a sentence, so it always has one."""

    is_quick = False

    def __init__(self, kinds: Collection[PersonalKind], pipeline: str, language: str | None = None) -> None:
        """`pipeline`: the name of an installed one, or its folder; a name begins with its language."""
        self._kinds = tuple(kinds)
        self._patterns = PiiPatternDetector(kinds)
        self._language = language or pipeline[:2]
        models = [{"lang_code": self._language, "model_name": pipeline}]
        provider = NlpEngineProvider(nlp_configuration={"nlp_engine_name": "spacy", "models": models})
        self._analyzer: Any = AnalyzerEngine(
            nlp_engine=provider.create_engine(),
            supported_languages=[self._language],
            default_score_threshold=_LEAST_SCORE,
        )
        able = set(self._analyzer.get_supported_entities(self._language))
        self._entities = [name for name, kind in _ENTITIES.items() if kind in self._kinds and name in able]

    def kinds_in(self, text: str) -> tuple[PersonalKind, ...]:
        found = set(self._patterns.kinds_in(text))
        if self._entities:
            rows = self._analyzer.analyze(text=text, language=self._language, entities=self._entities)
            found.update(_ENTITIES[row.entity_type] for row in rows)
        return tuple(kind for kind in self._kinds if kind in found)
