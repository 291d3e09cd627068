"""A checked body, the headers and the key become one Request."""

import difflib
import re
import secrets
from collections.abc import Mapping
from typing import Final

from appliance.core import Caller, ParsedRequest, Request, Residency, strictest
from appliance.errors import RequestError

RESIDENCY_HEADER: Final = "x-appliance-residency"
TAG_HEADER: Final = "x-appliance-tag"

_PREFIX: Final = "x-appliance-"
"""Of headers that are ours alone: one that we do not know is a mistake that might unbind a request."""

_TAG: Final = re.compile(r"[\w.:/-]{1,64}")


def make_request(
    asked: ParsedRequest, *, headers: Mapping[str, str], caller: Caller, request_id: str, now: float, wall: float
) -> Request:
    """`headers` in lower case (or a mapping that does not mind); `now` monotonic, `wall` epoch seconds.

    Raises RequestError for a header that cannot be understood: an unknown residency is never read as "any".
    """
    return Request(
        id=request_id,
        decision_id=new_decision_id(wall),
        endpoint=asked.endpoint,
        model=asked.model,
        body=asked.body,
        text=asked.text,
        stream=asked.stream,
        caller=caller,
        received=now,
        received_at=wall,
        residency=read_residency(headers),
        tag=read_tag(headers.get(TAG_HEADER)),
        headers=headers,
        format=asked.format,
        needs=asked.needs,
        output_tokens=asked.output_tokens,
    )


def new_decision_id(wall: float) -> str:
    """`dec_` and 32 hexadecimal digits: milliseconds first, so ids sort by time, then 80 random bits."""
    milliseconds = int(wall * 1000) & 0xFFFF_FFFF_FFFF
    return f"dec_{milliseconds:012x}{secrets.token_hex(10)}"


def read_residency(headers: Mapping[str, str]) -> Residency | None:
    """What the header says; where it was sent more than once, by a client and a proxy, the strictest of all that.

    Raises RequestError for a header that looks like one of ours and is none: a typo must not bind nothing.
    """
    # By items: asked for by name, such a mapping gives the first alone.
    ours = [(name, text) for name, text in headers.items() if name.lower().replace("_", "-").startswith(_PREFIX)]
    for name, _ in ours:
        if name.lower() not in (RESIDENCY_HEADER, TAG_HEADER):
            raise _unknown_header(name.lower())
    texts = [text for name, text in ours if name.lower() == RESIDENCY_HEADER]
    try:
        return strictest(*map(Residency.parse, texts)) if texts else None
    except ValueError as error:
        raise RequestError(f"header {RESIDENCY_HEADER}: {error}", param=RESIDENCY_HEADER) from error


def _unknown_header(name: str) -> RequestError:
    near = difflib.get_close_matches(name, (RESIDENCY_HEADER, TAG_HEADER), n=1, cutoff=0.0)[0]
    return RequestError(
        f"header {name[:80]!r} is none of ours, and {_PREFIX}* is reserved: did you mean {near}?", param=name[:80]
    )


def read_tag(text: str | None) -> str | None:
    if text is None or text == "":
        return None
    if not _TAG.fullmatch(text):
        raise RequestError(
            f"header {TAG_HEADER} is {text[:80]!r}: use up to 64 letters, digits and any of . _ : / -", param=TAG_HEADER
        )
    return text
