"""Configured providers as targets: plain rows that the policy can name."""

import ipaddress
from urllib.parse import urlsplit

from appliance.config.schema import Network, NodeConfig, Provider, ProviderModel
from appliance.core import Price, Target, TimeLimits
from appliance.errors import ConfigError


def provider_targets(config: NodeConfig) -> tuple[Target, ...]:
    """One target for every model of every provider, in the order of the file.

    Raises ConfigError where a provider that calls itself on-site has an address that is not.
    """
    targets = []
    for provider in config.providers:
        if provider.location == "onsite":
            _check_onsite(provider, config.network)
        targets += [_target(provider, model) for model in provider.models]
    return tuple(targets)


def _target(provider: Provider, model: ProviderModel) -> Target:
    price = None
    if model.input_usd is not None and model.output_usd is not None:
        price = Price(model.input_usd, model.output_usd, model.cached_input_usd)
    return Target(
        name=f"{provider.name}/{model.name}",
        location=provider.location,
        dialect=provider.dialect,
        address=provider.base_url,
        model=model.name,
        abilities=frozenset(model.abilities),
        context_tokens=model.context_tokens,
        region=provider.region,
        provider=provider.name,
        price=price,
        quality=model.quality,
        limits=TimeLimits(
            connect_seconds=provider.limits.connect_seconds,
            first_byte_seconds=provider.limits.first_byte_seconds,
            between_tokens_seconds=provider.limits.between_tokens_seconds,
        ),
    )


def _check_onsite(provider: Provider, network: Network) -> None:
    """An address literal is checked here; a name is checked when it is resolved, at each connection."""
    host = urlsplit(provider.base_url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return
    inside = address.is_loopback or any(address in ipaddress.ip_network(text) for text in network.onsite)
    if not inside:
        raise ConfigError(
            f"{host} is not an on-site address: list its network under [network] onsite, or make the provider hosted",
            field=f"providers.{provider.name}.base_url",
        )
