"""Answers in another dialect than OpenAI's: as they came where the target speaks it, else rewritten."""

from collections.abc import AsyncIterator
from typing import Final

from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.api.intake import InboundRequest
from appliance.api.json_responses import respond_whole
from appliance.api.relay import StreamResponse, stream_pieces
from appliance.router.protocols import PipelineAnswer
from appliance.tasks.chat import ChatCall
from appliance.wire.dialect import InboundDialect
from appliance.wire.openai.stream import write_chat_stream
from appliance.wire.streams import StreamRewriter, StreamStart


class DialectStream:
    """The events of `source` as `rewriter` writes them. Not a generator: one that never starts is never closed."""

    def __init__(self, source: AsyncIterator[bytes], rewriter: StreamRewriter) -> None:
        self._source = source
        self._rewriter = rewriter
        self._is_closed = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while not self._is_closed:
            try:
                block = await anext(self._source)
            except StopAsyncIteration:
                self._is_closed = True
                tail = self._rewriter.close()
                if tail:
                    return tail
                break
            piece = self._rewriter.feed(block)
            self._is_closed = self._rewriter.has_failed
            if piece:
                return piece
        raise StopAsyncIteration


async def respond_in_dialect(
    answer: PipelineAnswer,
    inbound: InboundRequest[ChatCall],
    dialect: InboundDialect,
    *,
    as_events: bool = True,
    content_type: str | None = None,
) -> ASGIApp:
    """The response to a chat that came in `dialect`. `as_events`: whether a stream is one of server-sent events.

    Owns the answer. Raises BackendGarbage for a reply that cannot be rewritten.
    """
    original = inbound.calls[0].original or {}
    if answer.stream is not None or inbound.request.stream:
        # What had to be verified whole first is written as a stream of the verified reply.
        source = answer.stream or stream_pieces(write_chat_stream(answer.payload, _WITH_USAGE))
        start = StreamStart(original, inbound.prompt_tokens, as_events)
        rewriter = StreamRewriter(dialect.write_stream(start))
        if answer.stream is not None and answer.is_forwarded:
            return StreamResponse(answer, answer.stream, rewriter.fail, content_type)
        return StreamResponse(answer, DialectStream(source, rewriter), rewriter.fail, content_type)
    if answer.raw is not None:
        await answer.aclose()
        return Response(answer.raw, answer.status, answer.metadata.headers(), "application/json")
    return await respond_whole(answer, lambda payload: dialect.write_reply(payload, original))


_WITH_USAGE: Final = {"stream_options": {"include_usage": True}}
