"""What each target can do, as `GET /v1/models` shows it."""

from collections.abc import Mapping
from typing import Any, Final

from appliance.core import Caller, Price, Target
from appliance.errors import UnknownModel
from appliance.router.protocols import RequestPipeline
from appliance.router.routing.match import bare_name

AUTO: Final = "auto"


def find_model(pipeline: RequestPipeline, caller: Caller, name: str) -> Target | None:
    """What a request for `name` would be given; None where the policy chooses. Raises UnknownModel."""
    resolve_alias = pipeline.resolve_alias(name)
    if resolve_alias == AUTO:
        return None
    there = pipeline.list_models(caller)
    for target in there:
        if target.name == resolve_alias:
            return target
    for target in there:
        if bare_name(target) == resolve_alias:
            return target
    raise UnknownModel(f"model {name[:256]!r} is not known here: list the models to see those that are")


def describe_target(target: Target) -> Mapping[str, Any]:
    """What the appliance knows of a target beside OpenAI's fields. Prices are in US dollars per million tokens."""
    return {
        "location": target.location,
        "region": target.region,
        "dialect": target.dialect,
        "variant": target.variant,
        "context_tokens": target.context_tokens,
        "max_output_tokens": target.wire.max_output_tokens or target.context_tokens,
        "input_modalities": ["text", "image"] if "vision" in target.abilities else ["text"],
        "output_modalities": ["text"] if target.abilities - {"embeddings"} else ["embedding"],
        "abilities": sorted(target.abilities),
        "quality": target.quality,
        "price": None if target.price is None else _price(target.price),
    }


def _price(price: Price) -> Mapping[str, float | None]:
    return {
        "input_usd": price.input_usd,
        "cached_input_usd": price.cached_input_usd,
        "output_usd": price.output_usd,
    }
