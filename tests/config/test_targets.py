"""Providers as targets."""

from typing import Any

import pytest

from appliance.config import NodeConfig, list_provider_targets
from appliance.core import Price
from appliance.errors import ConfigError


def config(**provider: Any) -> NodeConfig:
    row = {
        "name": "acme",
        "base_url": "https://api.example.com/v1",
        "models": ({"name": "mini", "input_usd": 0.1, "output_usd": 0.4},),
        **provider,
    }
    network = {"onsite": ("10.1.0.0/16",)}
    return NodeConfig.model_validate({"providers": (row,), "network": network})


def test_a_provider_row_becomes_a_target_with_its_price_and_limits() -> None:
    (target,) = list_provider_targets(config(region="EU", limits={"first_byte_seconds": 9.0}))
    assert (target.name, target.model, target.location, target.region) == ("acme/mini", "mini", "hosted", "EU")
    assert target.price == Price(0.1, 0.4, None)
    assert target.limits.first_byte_seconds == 9.0


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "10.1.2.3"])
def test_an_address_of_this_site_may_be_called_onsite(host: str) -> None:
    (target,) = list_provider_targets(config(location="onsite", base_url=f"http://{host}:8000/v1"))
    assert target.location == "onsite"


@pytest.mark.parametrize("host", ["8.8.8.8", "10.2.0.1", "[2001:db8::1]"])
def test_any_other_address_may_not_be_called_onsite(host: str) -> None:
    with pytest.raises(ConfigError, match=r"not an on-site address.*\[network\] onsite"):
        list_provider_targets(config(location="onsite", base_url=f"http://{host}:8000/v1"))
