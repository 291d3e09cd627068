"""Where a setting stands in a TOML text: tomllib keeps no positions, and an error without a line is half an error."""

import re

Location = tuple[int | str, ...]
"""A place in a TOML file: table names, keys, and the index within an array of tables."""

_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(#.*)?$")
_ASSIGNMENT = re.compile(r"^\s*([A-Za-z0-9_.\"'-]+)\s*=")


def line_of(text: str, location: Location) -> int | None:
    """The line (from 1) on which the setting at `location` stands, or its table's when it has no line of its own.

    tomllib keeps no positions; this follows table headers and assignments, which is enough for files people write.
    """
    best: tuple[int, int] | None = None
    counts: dict[Location, int] = {}
    table: Location = ()
    for number, line in enumerate(text.splitlines(), 1):
        header = _HEADER.match(line)
        if header:
            table = _table_path(header[2], is_array=header[1] == "[[", counts=counts)
            here = table
        elif assignment := _ASSIGNMENT.match(line):
            here = table + tuple(part.strip("\"' ") for part in assignment[1].split("."))
        else:
            continue
        depth = len(here)
        if location[:depth] == here and (best is None or depth > best[0]):
            best = (depth, number)
    return best[1] if best else None


def _table_path(header: str, *, is_array: bool, counts: dict[Location, int]) -> Location:
    path: Location = ()
    parts = [part.strip("\"' ") for part in header.split(".")]
    for position, part in enumerate(parts):
        path = (*path, part)
        if is_array and position == len(parts) - 1:
            counts[path] = counts.get(path, -1) + 1
        if path in counts:
            path = (*path, counts[path])
    return path


def dotted(location: Location) -> str:
    """`("routes", 1, "match")` as people write it: `routes[1].match`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
