"""Multipart uploads: parsed as they come and written to disk piece by piece, so that none is ever held whole."""

import asyncio
from collections.abc import Callable
from typing import Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request as Http

from appliance.errors import BodyTooLarge, ClientGone, RequestError

PIECE_BYTES: Final = 1_048_576
IDLE_SECONDS: Final = 60.0
"""Between two pieces of an upload; how long the whole takes is the client's affair."""
_MOST_FIELD_BYTES: Final = 4_096
_MOST_FIELDS: Final = 32


class UploadForm:
    """Takes the pieces of a body; blocking. `write` gets the file's bytes; other fields are kept, as they are short."""

    def __init__(self, content_type: str, write: Callable[[bytes], None]) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise RequestError(
                f"content-type is {content_type[:80]!r}: upload as multipart/form-data",
                param="content-type",
                status=415,
            )
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.is_whole = False
        self._write = write
        self._name, self._is_file, self._value = "", False, bytearray()
        self._header, self._header_value = bytearray(), bytearray()
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_header_name,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header,
                "on_part_data": self._on_data,
                "on_part_end": self._end,
                "on_end": self._on_end,
            },
        )

    def feed(self, data: bytes) -> None:
        """Raises RequestError for what is no form, and what `write` raises."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise RequestError(f"the form cannot be read: {error}") from error

    def _begin(self) -> None:
        self._name, self._is_file = "", False
        self._value.clear()

    def _on_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header(self) -> None:
        name, value = bytes(self._header).lower(), bytes(self._header_value)
        self._header.clear()
        self._header_value.clear()
        if name != b"content-disposition":
            return
        _, options = parse_options_header(value)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if b"filename" in options:
            if self._name != "file" or self.filename is not None:
                raise RequestError("the form has more than one file: send one, as the field `file`", param="file")
            self._is_file = True
            self.filename = options[b"filename"].decode("utf-8", "replace")[:255] or "upload"

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._write(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > _MOST_FIELD_BYTES or len(self.fields) >= _MOST_FIELDS:
            raise BodyTooLarge(f"the field {self._name[:80]!r} is too long, or one too many", param=self._name[:80])

    def _end(self) -> None:
        if not self._is_file:
            self.fields[self._name] = self._value.decode("utf-8", "replace")

    def _on_end(self) -> None:
        self.is_whole = True


async def receive_form(http: Http, form: UploadForm) -> None:
    """Feed the body to `form`, in a thread and in pieces of about a megabyte. Raises RequestError, ClientGone."""
    pieces: list[bytes] = []
    size, more = 0, True
    while more:
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                message = await http.receive()
        except TimeoutError as error:
            raise RequestError(f"nothing came for {IDLE_SECONDS:.0f} s: send without pauses", status=408) from error
        if message["type"] == "http.disconnect":
            raise ClientGone("the client left while it was uploading")
        pieces.append(message.get("body", b""))
        size, more = size + len(pieces[-1]), message.get("more_body", False)
        if size >= PIECE_BYTES or not more:
            await asyncio.to_thread(form.feed, b"".join(pieces))
            pieces, size = [], 0
    if not form.is_whole:
        raise RequestError("the form is cut off: its last boundary did not come")
    if form.filename is None:
        raise RequestError("the form has no file: send one as the field `file`", param="file")
