"""Which models are loaded when not all fit: what to load and what to unload now. Pure; `now` is monotonic seconds.

Loading takes seconds to minutes, so models must not chase each other out: one that was loaded stays for a while, one
that was put out for another comes back only after a while, and nobody is put out while it works. Until a model is
loaded its requests wait or overflow, as their routes say.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from appliance.engines.base import Placement

Residence = Literal["loaded", "moving", "resting"]

RAM: Final = "ram"
_DEMAND_SECONDS: Final = 60.0
"""A wish older than this has been given up or answered elsewhere."""


@dataclass(frozen=True, slots=True)
class Rules:
    idle_unload_seconds: float | None = None
    """A model that nobody has used for so long is unloaded; None: never for that alone."""
    least_residence_seconds: float = 60.0
    """So long a model stays once it is loaded, whoever wants its place."""
    cool_down_seconds: float = 20.0
    """So long a model that was put out for another waits before it puts out somebody itself."""


@dataclass(frozen=True, slots=True)
class Resident:
    """One model as it stands."""

    model: str
    pool: str
    """What its memory is taken of: the RAM, or certain devices."""
    bytes: int
    residence: Residence
    since: float
    """When it came to be so."""
    used_at: float
    """When a request last used it."""
    is_busy: bool = False
    wanted_at: float | None = None
    """When a request last wanted it in vain."""


@dataclass(frozen=True, slots=True)
class Move:
    kind: Literal["load", "unload"]
    model: str
    reason: str


def decide(now: float, residents: Sequence[Resident], pools: Mapping[str, int], rules: Rules) -> tuple[Move, ...]:
    """The moves to make now; none while there is nothing to do or somebody has to be waited for.

    `pools`: bytes that all models of a pool may hold together.
    """
    moves = [
        Move("unload", one.model, f"unloaded: not used for {now - max(one.used_at, one.since):.0f} s")
        for one in residents
        if _is_idle(one, now, rules)
    ]
    leaving = {move.model for move in moves}
    wanted = [one for one in residents if one.residence == "resting" and _is_wanted(one, now)]
    free = {
        pool: room - sum(one.bytes for one in residents if one.pool == pool and one.residence != "resting")
        for pool, room in pools.items()
    }
    for one in sorted(wanted, key=lambda one: one.wanted_at or 0.0):
        room = free.get(one.pool, 0)
        if one.bytes <= room:
            moves.append(Move("load", one.model, "wanted"))
            free[one.pool] = room - one.bytes
        elif not _somebody_moves(residents, one.pool) and now - one.since >= rules.cool_down_seconds:
            out = _victims(one, [other for other in residents if other.model not in leaving], room, now, rules)
            moves += [Move("unload", other.model, f"unloaded: {one.model} is wanted") for other in out]
            leaving |= {other.model for other in out}
            free[one.pool] = 0  # what they give back is for this one
    return tuple(moves)


def resting_at_first(placements: Sequence[Placement], pools: Mapping[str, int]) -> Mapping[str, str]:
    """Those of `placements`, in their order of preference, that do not fit beside the ones before them, and why."""
    left = dict(pools)
    resting = {}
    for placement in placements:
        pool, needed = pool_of(placement), placement.memory.total_bytes
        if needed <= left.get(pool, 0):
            left[pool] -= needed
        else:
            resting[placement.model] = (
                f"needs {needed:,} bytes where {left.get(pool, 0):,} are left; loaded when wanted"
            )
    return resting


def pool_of(placement: Placement) -> str:
    return RAM if placement.gpu is None else ",".join(placement.gpu.devices)


def _is_idle(one: Resident, now: float, rules: Rules) -> bool:
    if rules.idle_unload_seconds is None or one.residence != "loaded" or one.is_busy:
        return False
    return now - max(one.used_at, one.since) >= rules.idle_unload_seconds


def _is_wanted(one: Resident, now: float) -> bool:
    return one.wanted_at is not None and one.wanted_at > one.used_at and now - one.wanted_at <= _DEMAND_SECONDS


def _somebody_moves(residents: Sequence[Resident], pool: str) -> bool:
    return any(one.residence == "moving" and one.pool == pool for one in residents)


def _victims(wanted: Resident, others: Sequence[Resident], room: int, now: float, rules: Rules) -> Sequence[Resident]:
    """Whom to unload for `wanted`: the longest unused first, as few as it takes; nobody where that is not enough."""
    may_go = [
        one
        for one in others
        if one.pool == wanted.pool
        and one.residence == "loaded"
        and not one.is_busy
        and now - one.since >= rules.least_residence_seconds
    ]
    chosen: list[Resident] = []
    for one in sorted(may_go, key=lambda one: one.used_at):
        if room >= wanted.bytes:
            break
        chosen.append(one)
        room += one.bytes
    return chosen if room >= wanted.bytes else ()
