"""The probabilities of many answers to one choice, written as JSON at once.

Of a choice among 77 labels each answer holds 77 objects that differ in one number. Building them costs several times
what the numbers do, so where many texts were asked about the same options the text around the numbers is made once.
"""

from collections.abc import Sequence
from typing import Final

import orjson

from appliance.tasks.decisions.questions import Option

WORTH_A_TEMPLATE: Final = 8
"""With fewer options the objects are as quick, and easier to read in a test."""


class ShareWriter:
    """For one response. It remembers what stands around the numbers of each list of options that it saw."""

    def __init__(self) -> None:
        self._templates: dict[int, tuple[Sequence[Option], bytes]] = {}

    def write(self, options: Sequence[Option], shares: Sequence[float]) -> orjson.Fragment:
        """`[{"value": ..., "probability": ...}, ...]`, in order. There must be as many options as shares."""
        numbers = orjson.dumps(shares)[1:-1].split(b",")
        return orjson.Fragment(self._template(options) % tuple(numbers))

    def _template(self, options: Sequence[Option]) -> bytes:
        # By identity: comparing lists of options costs as much as writing them. Kept with it, so that it lives as long.
        known = self._templates.get(id(options))
        if known is None:
            values = (orjson.dumps(option.value).replace(b"%", b"%%") for option in options)
            known = (options, b"[%b]" % b",".join(b'{"value":' + value + b',"probability":%b}' for value in values))
            self._templates[id(options)] = known
        return known[1]
