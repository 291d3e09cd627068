"""What each target can do, as `GET /v1/models` shows it."""

from collections.abc import Mapping
from typing import Any

from appliance.core import Price, Target


def described(target: Target) -> Mapping[str, Any]:
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
