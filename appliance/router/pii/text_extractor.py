"""All that a model would read of a body, and whatever else would travel with it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from appliance.core.json_types import JsonObject

_ATTACHMENTS: Final = frozenset(
    {"image", "image_url", "input_image", "audio", "input_audio", "file", "input_file", "video", "video_url"}
)
_DATA_URL: Final = "data:"

CHUNK_CHARACTERS: Final = 16_384
"""So long a piece takes a millisecond or two, and others get their turn between pieces."""
OVERLAP_CHARACTERS: Final = 320
"""Longer than any identifier together with the words before it, so that none is cut in two."""


@dataclass(frozen=True, slots=True)
class TextExtractor:
    text: str
    """Every string and number of the body, names of fields included: `{"ssn": 123}` reads `ssn: 123`."""
    attachments: int
    """Images, sounds and files: nobody has looked into those."""


def extract_text(body: JsonObject, *, limit_characters: int | None = None) -> TextExtractor | None:
    """The whole body, not the parts that we know: fields we do not know travel on too. None beyond the limit."""
    pieces: list[str] = []
    attachments = length = 0
    waiting: list[Any] = [body]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            kind = value.get("type")
            if isinstance(kind, str) and kind in _ATTACHMENTS:
                attachments += 1
                continue
            for name, item in reversed(value.items()):
                # A name and its value stay together: the one tells what the other is.
                if isinstance(item, str | int | float):
                    waiting.append(f"{name}: {item}")
                else:
                    waiting += (name,) if item is None else (item, name)
            continue
        if isinstance(value, list):
            waiting.extend(reversed(value))
            continue
        if not isinstance(value, str):
            value = str(value)
        if _DATA_URL in value[:64] and ";base64," in value[:128]:
            attachments += 1
            continue
        pieces.append(value)
        length += len(value)
        if limit_characters is not None and length > limit_characters:
            return None
    return TextExtractor("\n".join(pieces), attachments)


def split_chunks(text: str) -> Iterator[str]:
    """Pieces that overlap, cut at spaces where there are some."""
    start = 0
    while len(text) - start > CHUNK_CHARACTERS:
        end = start + CHUNK_CHARACTERS
        space = text.rfind(" ", end - OVERLAP_CHARACTERS // 2, end)
        end = space if space != -1 else end
        yield text[start:end]
        start = end - OVERLAP_CHARACTERS
    yield text[start:]
