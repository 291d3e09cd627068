"""Images, sounds and files for targets of this site: they come with the request, or not at all.

A server that is given an address fetches it, wherever it leads: what stands in the address would leave the site with no
permit asked for, and the server would open connections that its caller chose.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from appliance.core import Target
from appliance.errors import Unsupported

_TEXTS: Final = frozenset({"text", "input_text", "output_text", "refusal", "input_json"})
_LABELS: Final = frozenset({"type", "detail", "format", "filename", "name", "mime_type", "media_type", "uuid"})
"""Fields of a part that nobody fetches."""
_LISTS: Final = ("messages", "input")
_CONTENTS: Final = ("content", "output")


def check_carried(target: Target, body: Mapping[str, Any]) -> None:
    """Raises Unsupported for the first part of a body for a target on-site whose data is elsewhere."""
    if target.location != "onsite":
        return
    for name in _LISTS:
        rows = body.get(name)
        if not isinstance(rows, list):
            continue
        for index, row in enumerate(rows):
            for content in _CONTENTS if isinstance(row, Mapping) else ():
                parts = row.get(content)
                if isinstance(parts, list):
                    _check_parts(target, parts, f"{name}[{index}].{content}")


def _check_parts(target: Target, parts: list[Any], path: str) -> None:
    for index, part in enumerate(parts):
        if not isinstance(part, Mapping):
            continue
        if part.get("type") in _TEXTS:
            # vLLM goes by such a field whatever the part calls itself.
            part = {name: value for name, value in part.items() if name.endswith("_url")}
        if not all(text.startswith("data:") for text in _texts(part)):
            where = f"{path}[{index}]"
            raise Unsupported(
                f"{target.name} is on-site and fetches nothing: send {where} along, as a data: URL", param=where
            )


def _texts(part: Mapping[str, Any]) -> Iterator[str]:
    """All texts of a part but for its labels."""
    left: list[Any] = [part]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            left += [inner for name, inner in value.items() if name not in _LABELS]
        elif isinstance(value, list):
            left += value
