"""One exchange with a target: send, time, read, and say in our own errors what went wrong.

What is written and how it is read is the dialect's; when it is given up, and what becomes of the connection, is decided
here for all of them.
"""

import asyncio
import contextlib
import hashlib
import math
import time
from collections.abc import AsyncGenerator
from typing import Any, Final, cast

import aiohttp
import httpx
import orjson

from appliance.core import EgressPermit, Target, UpstreamCall, UpstreamReply, Usage
from appliance.core.json_types import JsonObject
from appliance.errors import ApplianceError, BackendGarbage, BackendTimeout, StreamBroken
from appliance.upstream.base import Transport, close_response, transport_error
from appliance.upstream.error_mapping import error_in_success, error_of_status, is_error_payload
from appliance.upstream.label_scoring import tokens
from appliance.upstream.rate_limit_headers import cooldown_seconds
from appliance.upstream.reply_times import _EVENT_BYTES, first_event_seconds
from appliance.wire.chat_ir import SHAPE_ERRORS
from appliance.wire.dialect import WireRequest
from appliance.wire.forward import ForwardedStream
from appliance.wire.media import check_carried
from appliance.wire.registry import find_forwarder, find_outbound
from appliance.wire.sse import DONE, EventTooLong, without_end
from appliance.wire.streams import StreamTranslator

_LABELS: Final = tokens.TokenLabelScorer()

MAX_REPLY_BYTES: Final = 64_000_000
_MAX_ERROR_BYTES: Final = 64_000
_DRAIN_SECONDS: Final = 0.5
"""After `[DONE]` only the end of the body is due; waiting for it keeps the connection fit for the next request."""


def derive_cache_salt(key_id: str) -> str:
    """What keeps one caller's cached prefixes from another's: time to first token must not tell what others sent."""
    return hashlib.sha256(key_id.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def write_request(
    target: Target, outgoing: UpstreamCall, *, stream: bool, salt: str, may_forward: bool = False
) -> WireRequest:
    """What is to be sent to `target`. Nothing is sent yet. `may_forward`: the caller's own body, where that can be.

    Raises Unsupported naming the field that `target` cannot be given, RequestError where it cannot be written as JSON.
    """
    check_carried(target, outgoing.body)
    forwarder = find_forwarder(target, outgoing) if may_forward else None
    forwarded = None if forwarder is None else forwarder.write_request(target, outgoing, stream=stream)
    if forwarded is not None:
        return forwarded
    return find_outbound(target, outgoing).write_request(target, outgoing, stream=stream, salt=salt)


async def send_request(
    transport: Transport, wire_request: WireRequest, *, permit: EgressPermit | None, seconds: float
) -> UpstreamReply:
    """Get a whole reply within `seconds`. Raises BackendError's family, ContextTooLong, ResidencyRefused."""
    target = wire_request.target
    if tokens.is_label_request(wire_request):
        return await _LABELS.send(transport, wire_request, permit=permit, seconds=seconds)
    started = time.monotonic()
    try:
        async with asyncio.timeout(seconds):
            response = await transport.open(
                target, wire_request.path, wire_request.body, permit=permit, headers=wire_request.headers
            )
            first_byte = time.monotonic() - started
            try:
                if response.status_code != 200:
                    raise await _refusal(target, response)
                raw = await _read(target, response, MAX_REPLY_BYTES)
            finally:
                await close_response(response)
    except TimeoutError as error:
        raise BackendTimeout(f"{target.name} did not answer within {seconds:.1f} s") from error
    payload, usage = _read_reply(wire_request, _payload(target, raw))
    rest = cooldown_seconds(response.headers, time.time()) if target.provider is not None else None
    own = raw if wire_request.is_forwarded else None
    return UpstreamReply(payload, usage, first_byte, time.monotonic() - started, rest, own)


def read_batched(wire_request: WireRequest, payload: Any) -> UpstreamReply:
    """The reply that came back for one line of a provider's batch. Raises as `send_request`."""
    target = wire_request.target
    if is_error_payload(payload):
        raise error_in_success(target, payload["error"])
    if not isinstance(payload, dict):
        raise BackendGarbage(f"{target.name} answered a line of its batch without an object")
    read, usage = _read_reply(wire_request, payload)
    return UpstreamReply(read, usage, 0.0, 0.0)


def _read_reply(wire_request: WireRequest, payload: JsonObject) -> tuple[JsonObject, Usage]:
    """Replies are not validated field by field: one of another shape shows when it is read."""
    try:
        return find_outbound(wire_request.target, wire_request.outgoing).read_reply(wire_request, payload)
    except SHAPE_ERRORS as error:
        raise BackendGarbage(
            f"{wire_request.target.name} answered in a shape that its dialect does not have"
        ) from error


def _payload(target: Target, raw: bytes) -> JsonObject:
    try:
        payload = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BackendGarbage(f"{target.name} answered {raw[:60]!r}, which is not JSON") from error
    if is_error_payload(payload):
        raise error_in_success(target, payload["error"])
    if not isinstance(payload, dict):
        raise BackendGarbage(f"{target.name} answered a JSON {type(payload).__name__} where an object belongs")
    return payload


class ReplyStream:
    """An open stream whose first event has been seen. `next_block` until it returns b""; `aclose` in any case."""

    def __init__(self, wire_request: WireRequest, response: httpx.Response, seconds: float) -> None:
        self._target = wire_request.target
        self._response = response
        self.is_forwarded = wire_request.is_forwarded
        self._passage: StreamTranslator = _stream_reader(wire_request)
        choices = wire_request.outgoing.body.get("n")
        self._choices = choices if isinstance(choices, int) else 1
        self._ends_at = asyncio.get_running_loop().time() + seconds
        plain = "content-encoding" not in response.headers
        source = cast(httpx.AsyncByteStream, response.stream).__aiter__() if plain else response.aiter_bytes()
        self._chunks = cast(AsyncGenerator[bytes, None], source)
        self._first = b""
        self._closed = False
        self.tokens_seen = 0
        """Of the answer, as far as it was handed out: an estimate that is rather too high, for want of a count."""

    @property
    def usage(self) -> Usage | None:
        """Token counts, once the target has told them; some tell what they have come to before they are done."""
        return self._passage.usage

    @property
    def is_counted(self) -> bool:
        """Whether these counts are those of the whole answer."""
        passage = self._passage
        return passage.usage is not None and (passage.done or passage.finished_choices >= self._choices)

    @property
    def rest_seconds(self) -> float | None:
        """How long the target wants no more requests, where it said that this one took the last that it allows."""
        return cooldown_seconds(self._response.headers, time.time()) if self._target.provider is not None else None

    @property
    def is_whole(self) -> bool:
        """Whether everything that the target had to say has come and was handed out."""
        return self._passage.done and not self._first

    def without_ending(self, block: bytes) -> bytes:
        """The last block without the event that tells the caller that all is well."""
        if isinstance(self._passage, ForwardedStream):
            return block.removesuffix(self._passage.ending)
        return without_end(block)

    async def peek(self, seconds: float) -> None:
        """Read up to the first event and keep it. Raises where the stream fails before that."""
        held = b""
        waits_until = asyncio.get_running_loop().time() + seconds
        while b"data:" not in held:
            try:
                block = await self._read_block(waits_until)
            except StreamBroken as error:
                raise BackendGarbage(error.message) from error
            if self._passage.error is not None:
                raise error_in_success(self._target, self._passage.error)
            if block is None:
                raise BackendGarbage(f"{self._target.name} ended its stream before the first event")
            held += block
        self._first = held

    async def next_block(self) -> bytes:
        """One or more whole events, as the target sent them; b"" at the end. Raises StreamBroken, never ends early."""
        if self._first:
            first, self._first = self._first, b""
            self._see(first)
            return first
        if self._closed:
            return b""
        if self._passage.done:
            await self._drain()
            return b""
        until = asyncio.get_running_loop().time() + self._target.limits.between_tokens_seconds
        while True:
            block = await self._read_block(until) if self._passage.error is None else b""
            if block:
                self._see(block)
                return block
            if self._passage.error is not None:
                await self.aclose()
                raise StreamBroken(error_in_success(self._target, self._passage.error).message)
            if block is None:
                return await self._end()

    async def aclose(self) -> None:
        """Give the connection back; unless the body was read to its end this cancels the work at the target."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(httpx.HTTPError, aiohttp.ClientError, OSError):
            await self._chunks.aclose()
        await close_response(self._response)

    def _see(self, block: bytes) -> None:
        """An event is a token at least; where it is longer than one, four characters are one."""
        events = block.count(b"data:")
        self.tokens_seen += max(events, (len(block) - events * _EVENT_BYTES) // 4)

    async def _read_block(self, until: float) -> bytes | None:
        """Complete events, b"" where none is complete yet, None at the end of the body."""
        try:
            async with asyncio.timeout_at(min(until, self._ends_at)):
                chunk = await anext(self._chunks, None)
            return self._passage.feed(chunk) if chunk is not None else self._passage.end() or None
        except TimeoutError as error:
            is_over = asyncio.get_running_loop().time() >= self._ends_at
            words = "had not finished when the time for this request was over" if is_over else "fell silent"
            raise StreamBroken(f"{self._target.name} {words}") from error
        except EventTooLong as error:
            raise StreamBroken(f"{self._target.name}: {error}") from error
        except (httpx.HTTPError, aiohttp.ClientError, OSError) as error:
            raise StreamBroken(transport_error(self._target, error).message) from error

    async def _end(self) -> bytes:
        """The body is over. Some servers leave `[DONE]` out; a stream without a finish reason was cut off."""
        await self.aclose()
        if self._passage.done:
            return b""
        if self._passage.finished_choices < self._choices:
            raise StreamBroken(f"{self._target.name} ended its stream in the middle of the answer")
        self._passage.done = True
        return b"" if self.is_forwarded else DONE

    async def _drain(self) -> None:
        with contextlib.suppress(TimeoutError, httpx.HTTPError, aiohttp.ClientError, OSError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while await anext(self._chunks, None) is not None:
                    pass
        await self.aclose()


def _stream_reader(wire_request: WireRequest) -> StreamTranslator:
    forwarder = find_forwarder(wire_request.target, wire_request.outgoing) if wire_request.is_forwarded else None
    return translate_stream(wire_request) if forwarder is None else forwarder.read_stream(wire_request)


def translate_stream(wire_request: WireRequest) -> StreamTranslator:
    """What makes a stream of chat chunks of the target's, event by event."""
    return find_outbound(wire_request.target, wire_request.outgoing).translate_stream(wire_request)


async def open_stream(
    transport: Transport,
    wire_request: WireRequest,
    *,
    permit: EgressPermit | None,
    seconds: float,
    first_event_within: float = math.inf,
) -> ReplyStream:
    """Open a stream and see its first event. `seconds` bounds the whole stream; the target's limits bound its silences,
    and `first_event_within` the first one where that is shorter.

    Raises BackendError's family: until this returns another target may be tried.
    """
    target = wire_request.target
    loop = asyncio.get_running_loop()
    patience = min(seconds, first_event_seconds(target), first_event_within)
    started = loop.time()
    try:
        async with asyncio.timeout(patience):
            response = await transport.open(
                target, wire_request.path, wire_request.body, permit=permit, headers=wire_request.headers
            )
    except TimeoutError as error:
        raise BackendTimeout(f"{target.name} sent nothing for {patience:.1f} s") from error
    stream = ReplyStream(wire_request, response, seconds)
    try:
        if response.status_code != 200 or "event-stream" not in response.headers.get("content-type", ""):
            async with asyncio.timeout_at(started + patience):
                raise await _not_a_stream(target, response)
        await stream.peek(started + patience - loop.time())
    except TimeoutError as error:
        await stream.aclose()
        raise BackendTimeout(f"{target.name} sent nothing for {patience:.1f} s") from error
    except BaseException:
        await stream.aclose()
        raise
    return stream


async def _not_a_stream(target: Target, response: httpx.Response) -> ApplianceError:
    if response.status_code != 200:
        return await _refusal(target, response)
    raw = await _read(target, response, _MAX_ERROR_BYTES)
    with contextlib.suppress(orjson.JSONDecodeError):
        payload = orjson.loads(raw)
        if is_error_payload(payload):
            return error_in_success(target, payload["error"])
    return BackendGarbage(f"{target.name} was asked for a stream and answered {raw[:60]!r}")


async def _refusal(target: Target, response: httpx.Response) -> ApplianceError:
    try:
        raw = await _read(target, response, _MAX_ERROR_BYTES)
    except BackendGarbage:
        raw = b""
    return error_of_status(target, response.status_code, raw, response.headers, time.time())


async def _read(target: Target, response: httpx.Response, limit_bytes: int) -> bytes:
    """The whole body. Raises BackendGarbage where it is cut off or longer than `limit_bytes`."""
    parts = []
    size = 0
    try:
        async for part in response.aiter_bytes():
            parts.append(part)
            size += len(part)
            if size > limit_bytes:
                raise BackendGarbage(f"{target.name} sent more than {limit_bytes} bytes")
    except (httpx.HTTPError, aiohttp.ClientError, OSError) as error:
        raise BackendGarbage(f"{target.name} sent only part of its reply") from error
    return parts[0] if len(parts) == 1 else b"".join(parts)
