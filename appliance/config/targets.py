"""Configured providers as targets: plain rows that the policy can name."""

import ipaddress
from dataclasses import replace
from urllib.parse import urlsplit

from appliance.config.provider_settings import NetworkSettings, Provider, ProviderModel
from appliance.config.providers import ANTHROPIC_SAMPLING, ANTHROPIC_VERSION, KINDS, ProviderPreset, uses_deployments
from appliance.config.settings import NodeConfig
from appliance.core import PLAIN, Price, ProviderQuirks, Target, TimeLimits
from appliance.errors import ConfigError


def list_provider_targets(config: NodeConfig) -> tuple[Target, ...]:
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
    kind = KINDS[provider.is_kind]
    return Target(
        name=f"{provider.name}/{model.name}",
        location=provider.location,
        dialect=kind.dialect,
        address=provider.address,
        model=model.name,
        abilities=frozenset(kind.abilities if model.abilities is None else model.abilities),
        context_tokens=model.context_tokens,
        region=provider.region,
        provider=provider.name,
        price=_price(kind, model),
        batch_price=_batch_price(kind, model),
        quality=model.quality,
        limits=TimeLimits(
            connect_seconds=provider.limits.connect_seconds,
            first_byte_seconds=provider.limits.first_byte_seconds,
            between_tokens_seconds=provider.limits.between_tokens_seconds,
        ),
        wire=_wire(provider, kind, model),
    )


def _price(kind: ProviderPreset, model: ProviderModel) -> Price | None:
    """What is put into a cache costs more at some providers, and is never taken to cost less than it might."""
    if model.input_usd is None or model.output_usd is None:
        return None
    price = Price(model.input_usd, model.output_usd, model.cached_input_usd)
    if model.cache_write_usd is None and kind.cache_write == 1.0:
        return price
    write_usd = model.input_usd * kind.cache_write if model.cache_write_usd is None else model.cache_write_usd
    return replace(price, cache_write_usd=write_usd, cache_write_long_usd=write_usd * kind.long_to_short)


def _batch_price(kind: ProviderPreset, model: ProviderModel) -> Price | None:
    price = _price(kind, model)
    return None if price is None or model.batch_discount is None else price.times(1.0 - model.batch_discount)


def _wire(provider: Provider, kind: ProviderPreset, model: ProviderModel) -> ProviderQuirks:
    headers, refuses, query = dict(provider.headers), kind.wire.refuses, ""
    if kind.dialect == "anthropic":
        version = headers["anthropic-version"] = provider.api_version or ANTHROPIC_VERSION
        refuses |= ANTHROPIC_SAMPLING if version >= ANTHROPIC_VERSION else frozenset()
    elif provider.api_version is not None:
        query = f"api-version={provider.api_version}"
    wire = replace(
        kind.wire,
        headers=tuple(sorted(headers.items())),
        query=query,
        deployments=uses_deployments(provider.is_kind, provider.address),
        refuses=refuses | set(model.refuses),
        leaves_out=kind.wire.leaves_out | set(model.leaves_out),
        api=model.api,
        thinking=model.thinking,
        max_output_tokens=model.max_output_tokens,
    )
    return PLAIN if wire == PLAIN else wire


def _check_onsite(provider: Provider, network: NetworkSettings) -> None:
    """An address literal is checked here; a name is checked when it is resolved, at each connection."""
    host = urlsplit(provider.address).hostname or ""
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
