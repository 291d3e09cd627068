"""Images, sounds and files: how they come along, and what a target on-site may be given.

A server that is given an address fetches it, wherever it leads: what stands in the address would leave the site without
an egress permit, and the server would open connections that its caller chose. So targets on-site get data alone.
"""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from appliance.core import Target
from appliance.core.json_types import JsonObject
from appliance.errors import RequestError, Unsupported
from appliance.wire.chat_ir import TEXT_PARTS
from appliance.wire.strict_fields import wrong

IMAGE_TYPES: Final = ("image/jpeg", "image/png", "image/gif", "image/webp")
"""Those that every model with eyes reads; Anthropic takes no others."""
AUDIO_TYPES: Final[Mapping[str, str]] = {"wav": "audio/wav", "mp3": "audio/mp3"}
"""The formats that a chat's audio parts have, as media types."""
PDF: Final = "application/pdf"

_MEDIA_TYPE: Final = re.compile(r"[a-z0-9.+-]{1,40}/[a-z0-9.+-]{1,80}")
_DATA_URL: Final = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w=.+-]+)*),", re.ASCII)
_WEB: Final = ("https://", "http://")

_HARMLESS_PARTS: Final = TEXT_PARTS | {"input_json"}
_LABELS: Final = frozenset({"type", "detail", "format", "filename", "name", "mime_type", "media_type", "uuid"})
"""Fields of a part that hold no address."""
_LISTS: Final = ("messages", "input")
_CONTENTS: Final = ("content", "output")


class MediaData(NamedTuple):
    """What a `data:` URL holds."""

    media_type: str
    data: str
    """base64"""


def read_data_url(url: str, param: str) -> MediaData:
    """Raises RequestError where it is not base64 of a stated type."""
    match = _DATA_URL.match(url)
    if match is None or match.group(1) is None:
        raise RequestError(f"{param} must be a data URL of the form data:image/png;base64,...", param=param)
    data = url[match.end() :]
    if ";base64" not in match.group(2):
        raise RequestError(f"{param} must be base64: data:{match.group(1)};base64,...", param=param)
    try:
        base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{param} is not valid base64: {error}", param=param) from error
    return MediaData(match.group(1).lower(), data)


def make_data_url(media_type: object, data: object, path: str, media_path: str) -> str:
    """An image given as base64 (either alphabet) as the `data:` URL that chat bodies carry it in."""
    if not isinstance(media_type, str) or not _MEDIA_TYPE.fullmatch(media_type):
        raise wrong(media_path, media_type, "it must be a media type such as image/png")
    if not isinstance(data, str) or not data:
        raise wrong(path, None if data == "" else data, "it must be the image's bytes in base64")
    plain = plain_base64(data)
    try:
        base64.b64decode(plain, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{path} is not base64: {error}", param=path) from error
    return f"data:{media_type};base64,{plain}"


def plain_base64(text: str) -> str:
    """base64 of either alphabet, with or without padding, in the plain one and padded."""
    plain = text.replace("-", "+").replace("_", "/")
    return plain + "=" * (-len(plain) % 4)


def check_web_address(value: object, path: str) -> str:
    if not is_web_address(value):
        raise wrong(path, value, "it must be an http or https address")
    return str(value)


def is_web_address(value: object) -> bool:
    return isinstance(value, str) and value.startswith(_WEB)


def check_carried(target: Target, body: JsonObject) -> None:
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


def _check_parts(target: Target, parts: Sequence[Any], path: str) -> None:
    for index, part in enumerate(parts):
        if not isinstance(part, Mapping):
            continue
        if part.get("type") in _HARMLESS_PARTS:
            # vLLM goes by such a field whatever the part calls itself.
            part = {name: value for name, value in part.items() if name.endswith("_url")}
        if not all(text.startswith("data:") for text in _texts(part)):
            where = f"{path}[{index}]"
            raise Unsupported(
                f"{target.name} is on-site and fetches nothing: send {where} along, as a data: URL", param=where
            )


def _texts(part: JsonObject) -> Iterator[str]:
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
