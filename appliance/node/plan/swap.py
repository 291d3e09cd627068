"""Which models are loaded when not all fit: what to load and what to unload now. Pure; `now` is monotonic seconds.

Loading takes seconds to minutes, so models must not displace each other all the time. A loaded model stays for a
while, one that was unloaded for another comes back only after a while, and a busy model is never unloaded. Until a
model is loaded its requests wait or overflow, as their routes say.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from appliance.engines.base import Placement

Residence = Literal["loaded", "moving", "unloaded"]

RAM: Final = "ram"
_DEMAND_SECONDS: Final = 60.0
"""A request older than this has been given up or answered elsewhere."""


@dataclass(frozen=True, slots=True)
class SwapRules:
    idle_unload_seconds: float | None = None
    """A model that has not been used for so long is unloaded; None: never for that alone."""
    least_residence_seconds: float = 60.0
    """So long a model stays once it is loaded, whatever else is wanted."""
    cool_down_seconds: float = 20.0
    """So long a model that was unloaded for another waits before it displaces one itself."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One model as it stands."""

    model: str
    pools: tuple[str, ...]
    """What its memory is taken of: the RAM, or one or several devices."""
    bytes: int
    """Of each of its pools."""
    residence: Residence
    since: float
    """When it came to be so."""
    used_at: float
    """When a request last used it."""
    is_busy: bool = False
    requested_at: float | None = None
    """When a request last had to go without it."""


@dataclass(frozen=True, slots=True)
class SwapMove:
    kind: Literal["load", "unload"]
    model: str
    reason: str


def decide_swaps(
    now: float, models: Sequence[LoadedModel], pools: Mapping[str, int], rules: SwapRules
) -> tuple[SwapMove, ...]:
    """The moves to make now; none while there is nothing to do or a model is still moving.

    `pools`: bytes that all models of a pool may hold together.
    """
    moves = [
        SwapMove("unload", one.model, f"unloaded: not used for {now - max(one.used_at, one.since):.0f} s")
        for one in models
        if _is_idle(one, now, rules)
    ]
    leaving = {move.model for move in moves}
    wanted = [one for one in models if one.residence == "unloaded" and _is_wanted(one, now)]
    free = {
        pool: room - sum(one.bytes for one in models if pool in one.pools and one.residence != "unloaded")
        for pool, room in pools.items()
    }
    for one in sorted(wanted, key=lambda one: one.requested_at or 0.0):
        if all(one.bytes <= free.get(pool, 0) for pool in one.pools):
            moves.append(SwapMove("load", one.model, "wanted"))
            free |= {pool: free[pool] - one.bytes for pool in one.pools}
        elif not _is_any_moving(models, one.pools) and now - one.since >= rules.cool_down_seconds:
            out = _choose_models_to_unload(
                one, [other for other in models if other.model not in leaving], free, now, rules
            )
            moves += [SwapMove("unload", other.model, f"unloaded: {one.model} is wanted") for other in out]
            leaving |= {other.model for other in out}
            free |= dict.fromkeys(one.pools, 0)  # what they give back is for this one
    return tuple(moves)


def find_initially_unloaded(placements: Sequence[Placement], pools: Mapping[str, int]) -> Mapping[str, str]:
    """Those of `placements`, in their order of preference, that do not fit beside the ones before them, and why."""
    left = dict(pools)
    unloaded = {}
    for placement in placements:
        taken, needed = list_memory_pools(placement), placement.memory.total_bytes
        least = min(left.get(pool, 0) for pool in taken)
        if needed <= least:
            left |= {pool: left[pool] - needed for pool in taken}
        else:
            unloaded[placement.model] = f"needs {needed:,} bytes where {least:,} are left; loaded when wanted"
    return unloaded


def list_memory_pools(placement: Placement) -> tuple[str, ...]:
    """What it takes its memory of, the same from each. Devices without memory of their own take the machine's."""
    if placement.gpu is None:
        return (RAM,)
    return (*placement.gpu.devices, RAM) if placement.gpu.unified_memory else placement.gpu.devices


def _is_idle(one: LoadedModel, now: float, rules: SwapRules) -> bool:
    if rules.idle_unload_seconds is None or one.residence != "loaded" or one.is_busy:
        return False
    return now - max(one.used_at, one.since) >= rules.idle_unload_seconds


def _is_wanted(one: LoadedModel, now: float) -> bool:
    return one.requested_at is not None and one.requested_at > one.used_at and now - one.requested_at <= _DEMAND_SECONDS


def _is_any_moving(models: Sequence[LoadedModel], pools: Sequence[str]) -> bool:
    return any(one.residence == "moving" and not set(pools).isdisjoint(one.pools) for one in models)


def _choose_models_to_unload(
    wanted: LoadedModel, others: Sequence[LoadedModel], free: Mapping[str, int], now: float, rules: SwapRules
) -> Sequence[LoadedModel]:
    """Which models to unload for `wanted`: the longest unused first, as few as it takes; none if that is not enough."""
    may_go = [
        one
        for one in others
        if one.residence == "loaded" and not one.is_busy and now - one.since >= rules.least_residence_seconds
    ]
    chosen: list[LoadedModel] = []
    lacks = {pool: wanted.bytes - free.get(pool, 0) for pool in wanted.pools}
    for one in sorted(may_go, key=lambda one: one.used_at):
        if any(lacks.get(pool, 0) > 0 for pool in one.pools):
            chosen.append(one)
            lacks = {pool: lack - one.bytes * (pool in one.pools) for pool, lack in lacks.items()}
    return chosen if all(lack <= 0 for lack in lacks.values()) else ()
