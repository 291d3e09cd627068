"""The fields of request bodies, checked. Each function raises RequestError, which names the field."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from appliance.core.json_types import JsonObject
from appliance.encoders.linear_models import TIERS, Tier
from appliance.encoders.store import check_name
from appliance.errors import RequestError

MAX_TEXTS: Final = 10_000
"""Of one call that classifies."""
MAX_INPUTS: Final = 2_048
"""Of one call that embeds; OpenAI's limit."""


@dataclass(frozen=True, slots=True)
class TrainRequest:
    """What a training is asked for, besides the examples."""

    name: str
    wanted_accuracy: float | None
    max_tier: Tier
    labels: Sequence[str] | None
    encoder: str | None
    with_kept: bool
    """Train on the examples kept before as well."""
    keep_examples: bool
    serve: bool


@dataclass(frozen=True, slots=True)
class ThresholdRequest:
    """What a threshold is asked for. `over_texts` None: the bound is for the long run."""

    bound: float
    confidence: float
    over_texts: int | None
    version: int | None
    live: Sequence[tuple[float, bool]]
    """Confidence and whether the answer was right, of a random sample of traffic."""
    complaints: Sequence[float]
    """Confidences of answers that were reported as wrong: no sample, so they only count against."""


def parse_train_request(body: JsonObject) -> TrainRequest:
    name = check_name(body.get("name"))
    wanted, tier = body.get("accuracy"), body.get("tier", TIERS[-1])
    if wanted is not None and (type(wanted) not in (int, float) or not 0 < wanted < 1):
        raise RequestError(f"accuracy is {wanted!r}: it must be a number between 0 and 1", param="accuracy")
    if tier not in TIERS:
        raise RequestError(f"tier is {str(tier)[:40]!r}: it must be {' or '.join(TIERS)}", param="tier")
    return TrainRequest(
        name=name,
        wanted_accuracy=wanted,
        max_tier=tier,
        labels=_parse_labels(body.get("labels")),
        encoder=body.get("encoder"),
        with_kept=_parse_flag(body, "with_kept"),
        keep_examples=_parse_flag(body, "keep_examples"),
        serve=_parse_flag(body, "serve", default=True),
    )


def parse_threshold_request(body: JsonObject) -> ThresholdRequest:
    bound, confidence = body.get("bound"), body.get("confidence")
    if not isinstance(bound, float) or not isinstance(confidence, float):
        raise RequestError("bound and confidence must be numbers between 0 and 1", param="bound")
    return ThresholdRequest(
        bound=bound,
        confidence=confidence,
        over_texts=body.get("over_texts") or None,
        version=parse_version(body.get("version")),
        live=[(float(score), bool(right)) for score, right in body.get("live") or ()],
        complaints=[float(score) for score in body.get("complaints") or ()],
    )


def parse_model_name(body: JsonObject) -> str:
    value = body.get("model")
    if not isinstance(value, str) or not value:
        raise RequestError(f"model is {value!r:.40}: it must be a name", param="model")
    return value


def parse_texts(body: JsonObject, field: str, limit: int) -> Sequence[str]:
    """A text alone is a list of one."""
    given = body.get(field)
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise RequestError(f"{field} must be a text or a list of 1 to {limit} texts", param=field)
    if len(texts) > limit:
        raise RequestError(f"{field} has {len(texts)} texts: at most {limit} in one call", param=field)
    return texts


def parse_version(given: Any) -> int | None:
    """None: the version that serves."""
    if given is None:
        return None
    if type(given) is not int or given < 1:
        raise RequestError(f"version is {given!r:.40}: it must be a whole number from 1", param="version")
    return given


def _parse_flag(body: JsonObject, field: str, *, default: bool = False) -> bool:
    value = body.get(field)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{field} is {value!r:.40}: it must be true or false", param=field)
    return default if value is None else value


def _parse_labels(given: Any) -> Sequence[str] | None:
    if given is None:
        return None
    if not isinstance(given, list) or not all(isinstance(label, str) and label.strip() for label in given):
        raise RequestError("labels must be a list of names", param="labels")
    return [label.strip() for label in given]
