"""What changed between two policies, in words."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from appliance.config.policy import Policy


def list_policy_changes(old: Policy, new: Policy) -> list[str]:
    """One line for each route that came, went or moved and for each field that changed; none where nothing did."""
    before, after = _dumped(old), _dumped(new)
    lines = [
        line
        for table in ("defaults", "capacity")
        for line in _fields(before.get(table, {}), after.get(table, {}), f"[{table}] ")
    ]
    were = {route["name"]: route for route in before["routes"]}
    are = {route["name"]: route for route in after["routes"]}
    lines += [f"route {name!r} is gone" for name in were if name not in are]
    lines += [f"route {name!r} is new: {_shown(_without_name(are[name]))}" for name in are if name not in were]
    for name in (name for name in are if name in were):
        lines += _fields(_without_name(were[name]), _without_name(are[name]), f"route {name!r}: ")
    kept = [name for name in were if name in are]
    order = [name for name in are if name in were]
    if kept != order:
        lines.append(f"the order of routes was {', '.join(kept)}, and is {', '.join(order)}")
    return lines


def _dumped(policy: Policy) -> dict[str, Any]:
    return policy.model_dump(mode="json", exclude_none=True)


def _without_name(route: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in route.items() if field != "name"}


def _fields(old: Mapping[str, Any], new: Mapping[str, Any], head: str) -> Iterator[str]:
    was, now = dict(_flat(old)), dict(_flat(new))
    for field in [*was, *(field for field in now if field not in was)]:
        if field not in now:
            yield f"{head}{field} is no longer set (it was {_shown(was[field])})"
        elif field not in was:
            yield f"{head}{field} is now {_shown(now[field])} (it was not set)"
        elif was[field] != now[field]:
            yield f"{head}{field} was {_shown(was[field])}, and is {_shown(now[field])}"


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{field}.")
        else:
            yield f"{prefix}{field}", value


def _shown(value: Any) -> str:
    """As it would stand in the file."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case Mapping():
            parts = [f"{field} = {_shown(item)}" for field, item in value.items() if item not in ({}, [], ())]
            return "{ " + ", ".join(parts) + " }"
        case Sequence():
            return "[" + ", ".join(map(_shown, value)) + "]"
        case _:
            return f"{value:g}" if isinstance(value, float) else str(value)
