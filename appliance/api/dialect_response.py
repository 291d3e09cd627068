"""Answers in another dialect than OpenAI's: whole ones rewritten, streams rewritten event by event."""

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.types import ASGIApp

from appliance.api.intake import InboundRequest
from appliance.api.json_responses import json_response
from appliance.api.relay import StreamResponse, as_stream
from appliance.errors import ApplianceError
from appliance.router.protocols import PipelineAnswer
from appliance.tasks.chat import ChatCall
from appliance.wire.chat_stream import DialectStreamWriter, StreamRewriter
from appliance.wire.openai.stream import stream_of


class DialectResponse:
    """The events of `source` as `translation` writes them. Not a generator: one that never starts is never closed."""

    def __init__(self, source: AsyncIterator[bytes], translation: StreamRewriter) -> None:
        self._source = source
        self._translation = translation
        self._is_closed = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while not self._is_closed:
            try:
                block = await anext(self._source)
            except StopAsyncIteration:
                self._is_closed = True
                tail = self._translation.close()
                if tail:
                    return tail
                break
            piece = self._translation.feed(block)
            self._is_closed = self._translation.has_failed
            if piece:
                return piece
        raise StopAsyncIteration


async def translated(
    answer: PipelineAnswer,
    opened: InboundRequest[ChatCall],
    *,
    whole: Callable[[Mapping[str, Any]], Any],
    writer: Callable[[], DialectStreamWriter],
    content_type: str | None = None,
) -> ASGIApp:
    """The response to a chat that came in another dialect: `whole` rewrites a payload, `writer` a stream.

    Owns the answer. Raises BackendGarbage for a reply that cannot be rewritten.
    """
    if answer.stream is not None or opened.request.stream:
        # What had to be verified whole first is written as a stream of the verified reply.
        source = answer.stream or as_stream(stream_of(answer.payload, {**opened.request.body, **_WITH_USAGE}))
        translation = StreamRewriter(writer())
        return StreamResponse(answer, DialectResponse(source, translation), translation.fail, content_type)
    headers = answer.metadata.headers()
    try:
        return json_response(whole(answer.payload), status=answer.status, headers=headers)
    except ApplianceError as error:
        error.headers = headers
        raise
    finally:
        await answer.aclose()


_WITH_USAGE: Mapping[str, Any] = {"stream_options": {"include_usage": True}}
