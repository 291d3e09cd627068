"""Texts too long for one call: cut into pieces where paragraphs end, and the pieces' objects put together as one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.tasks.extract.value_spans import escape_pointer_key
from appliance.wire.usage import estimate_tokens

OVERLAP_SHARE = 0.1
"""Of a piece: what stands at a cut stands whole in one of the two."""
_BREAKS = ("\n\n", "\n", ". ", " ")
"""Where a text may be cut, best first."""

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class TextChunk:
    """What was found in one piece of a text."""

    span: Span
    object: JsonObject
    confidence: Mapping[str, float] | None


@dataclass(frozen=True, slots=True)
class MergedObject:
    object: JsonObject
    confidence: Mapping[str, float] | None
    evidence: Mapping[str, Span]
    """By JSON pointer of a property, or of a list's item: the piece it was taken from, as characters of the text."""


def split_spans(text: str, tokens: int) -> tuple[Span, ...]:
    """The pieces of `text`, each of about `tokens` tokens or less, overlapping; one where all of it fits."""
    needed = estimate_tokens(text)
    if needed <= tokens:
        return ((0, len(text)),)
    size = max(1, len(text) * tokens // needed)
    found: list[Span] = []
    start = 0
    while len(text) - start > size:
        stop = _break_before(text, start + size // 2, start + size)
        found.append((start, stop))
        overlap = int(OVERLAP_SHARE * size)
        start = max(start + 1, _break_before(text, stop - overlap, stop - overlap // 2))
    return (*found, (start, len(text)))


def _break_before(text: str, low: int, high: int) -> int:
    """The end of the last paragraph between `low` and `high`, or of a line, a sentence, a word; else `high`."""
    for mark in _BREAKS:
        place = text.rfind(mark, low, high)
        if place >= 0:
            return place + len(mark)
    return high


def merge_chunks(parts: Sequence[TextChunk]) -> MergedObject:
    """One object of the pieces' objects, in order of the pieces.

    Lists are joined, without what stood in two. Of any other property the most confident value is taken that is not
    empty, or the first of them where nobody tells how confident.
    """
    known = all(part.confidence is not None for part in parts)
    merged: MutableJsonObject = {}
    confidence: dict[str, float] = {}
    evidence: dict[str, Span] = {}
    for name in dict.fromkeys(name for part in parts for name in part.object):
        holders = [part for part in parts if name in part.object]
        pointer = f"/{escape_pointer_key(name)}"
        if all(isinstance(part.object[name], list) for part in holders):
            merged[name] = _join(holders, name, pointer, confidence, evidence)
            continue
        best = max(holders, key=lambda part: (not _is_empty(part.object[name]), _least(part, pointer)))
        merged[name] = best.object[name]
        evidence[pointer] = best.span
        confidence |= _below(best, pointer, pointer)
    return MergedObject(merged, confidence if known else None, evidence)


def _join(
    holders: Sequence[TextChunk], name: str, pointer: str, confidence: dict[str, float], evidence: dict[str, Span]
) -> list[Any]:
    items: dict[bytes, Any] = {}
    for part in holders:
        for index, item in enumerate(part.object[name]):
            key = orjson.dumps(item, option=orjson.OPT_SORT_KEYS)
            if key not in items:
                place = f"{pointer}/{len(items)}"
                evidence[place] = part.span
                confidence |= _below(part, f"{pointer}/{index}", place)
                items[key] = item
    return list(items.values())


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {})


def _least(part: TextChunk, pointer: str) -> float:
    return min(_below(part, pointer, pointer).values(), default=0.0)


def _below(part: TextChunk, pointer: str, renamed: str) -> dict[str, float]:
    """The confidences at `pointer` and under it, by pointers that begin with `renamed` instead."""
    rows = (part.confidence or {}).items()
    return {
        renamed + place[len(pointer) :]: share
        for place, share in rows
        if place == pointer or place.startswith(f"{pointer}/")
    }
