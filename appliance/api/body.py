"""Receiving a request's body: bounded in size and in time, with every refusal naming what is wrong."""

import asyncio
from collections.abc import Mapping

from starlette.types import Receive

from appliance.errors import BodyTooLarge, ClientGone, RequestError

BODY_SECONDS = 60.0
"""For a whole body to come, so that nobody holds a connection by sending a byte now and then. The largest body that is
read by default needs 1 Mbit/s."""


async def read_body(receive: Receive, headers: Mapping[str, str], max_bytes: int) -> bytes:
    """The raw body. Raises BodyTooLarge as soon as it is known to be too large, without reading the rest, and
    RequestError where it has not come after BODY_SECONDS."""
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise RequestError(
            f"content-encoding is {encoding[:40]!r}: send the JSON uncompressed", param="content-encoding", status=415
        )
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise _too_large(f"{int(length)} bytes", max_bytes)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _read_all(receive, max_bytes)
    except TimeoutError as error:
        late = RequestError(f"the body did not come within {BODY_SECONDS:.0f} s: send it without pauses", status=408)
        late.headers = {"connection": "close"}
        raise late from error


async def _read_all(receive: Receive, max_bytes: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client left while it was sending its request")
        piece = message.get("body", b"")
        size += len(piece)
        if size > max_bytes:
            raise _too_large(f"more than {size - 1} bytes", max_bytes)
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


def _too_large(size: str, max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has {size}, and at most {max_bytes} are read here: send less in one request")
