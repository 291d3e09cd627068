"""OpenAI's reply shapes: completions, chunks, log probabilities, usage."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from appliance.core.json_types import MutableJsonObject
from appliance.llamacpp.chat.reply_parsers import MessagePart, ReplyPieces
from appliance.llamacpp.chat.reply_text import PlacedToken
from appliance.llamacpp.engine_protocol import TokenEvent
from appliance.llamacpp.server.generation import GenerationDelta, TokenUsage, WholeReply
from appliance.llamacpp.tools.cursor import ContentDelta, Event, ReasoningDelta, ToolCallArgumentsDelta, ToolCallStart

Json = MutableJsonObject
Kind = Literal["chat", "completion"]

IMPOSSIBLE_LOGPROB = -9999.0
"""OpenAI's figure for "minus infinity", which JSON cannot hold."""


def write_usage(usage: TokenUsage) -> Json:
    written: Json = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    if usage.reasoning_tokens is not None:
        written["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return written


@dataclass(frozen=True, slots=True)
class ReplyWriter:
    """Writes the replies of one call. `logprobs` says whether the caller asked for them."""

    kind: Kind
    id: str
    created: int
    model: str
    pieces: ReplyPieces
    logprobs: bool
    include_usage: bool = False

    @classmethod
    def new(cls, kind: Kind, model: str, pieces: ReplyPieces, *, logprobs: bool, include_usage: bool) -> "ReplyWriter":
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        return cls(kind, f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model, pieces, logprobs, include_usage)

    def whole(self, choices: Sequence[WholeReply], usage: TokenUsage) -> Json:
        written = self._chat_choice if self.kind == "chat" else self._text_choice
        return {
            **self._head("chat.completion" if self.kind == "chat" else "text_completion"),
            "choices": [written(index, choice) for index, choice in enumerate(choices)],
            "usage": write_usage(usage),
        }

    def opening(self, index: int) -> Json | None:
        """The chunk with the role; plain completions have none."""
        if self.kind == "completion":
            return None
        return self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}, **_NO_END})

    def chunks(self, delta: GenerationDelta) -> list[Json]:
        """A step's chunks: its text, then, in one of its own, its end."""
        written = []
        part = delta.part
        if part.events:
            written += self._event_chunks(delta.index, part)
        elif part.text or part.tokens:
            if self.kind == "chat":
                content: Json = {"delta": {"content": part.text}}
            else:
                content = {"text": part.text}
            logprobs = self._logprobs(part.tokens)
            written.append(self._chunk({"index": delta.index, **content, "logprobs": logprobs, "finish_reason": None}))
        if delta.end is not None:
            empty: Json = {"delta": {}} if self.kind == "chat" else {"text": ""}
            end = {"logprobs": None, "finish_reason": delta.end, **_stop(delta.stopped_by)}
            written.append(self._chunk({"index": delta.index, **empty, **end}))
        return written

    def closing(self, usage: TokenUsage) -> Json | None:
        """The chunk with the usage, where it was asked for."""
        if not self.include_usage:
            return None
        return {**self._head(self._chunk_object), "choices": [], "usage": write_usage(usage)}

    def _event_chunks(self, index: int, part: MessagePart) -> list[Json]:
        """One chunk for each event; the log probabilities of the content go with the first of its chunks."""
        chunks = []
        tokens = part.tokens
        for event in part.events:
            here = tokens if isinstance(event, ContentDelta) else ()
            tokens = () if isinstance(event, ContentDelta) else tokens
            choice = {"index": index, "delta": self._delta(event), "logprobs": self._logprobs(here)}
            chunks.append(self._chunk({**choice, "finish_reason": None}))
        return chunks

    def _delta(self, event: Event) -> Json:
        match event:
            case ContentDelta():
                return {"content": event.text}
            case ReasoningDelta():
                return {"reasoning_content": event.text}
            case ToolCallStart():
                function = {"name": event.name, "arguments": ""}
                call = {"index": event.index, "id": new_call_id(), "type": "function", "function": function}
                return {"tool_calls": [call]}
            case ToolCallArgumentsDelta():
                return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choice: Json) -> Json:
        chunk = {**self._head(self._chunk_object), "choices": [choice]}
        if self.include_usage:
            chunk["usage"] = None
        return chunk

    def _chat_choice(self, index: int, choice: WholeReply) -> Json:
        message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        if choice.calls:
            message["content"] = choice.text or None
            message["tool_calls"] = [
                {"id": new_call_id(), "type": "function", "function": {"name": name, "arguments": arguments}}
                for name, arguments in choice.calls
            ]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.end,
            **_stop(choice.stopped_by),
        }

    def _text_choice(self, index: int, choice: WholeReply) -> Json:
        logprobs = self._logprobs(choice.tokens)
        end = {"finish_reason": choice.end, **_stop(choice.stopped_by)}
        return {"index": index, "text": choice.text, "logprobs": logprobs, **end}

    def _logprobs(self, tokens: Sequence[PlacedToken[TokenEvent]]) -> Json | None:
        if not self.logprobs:
            return None
        if self.kind == "chat":
            return {"content": [self._chat_token(token.note) for token in tokens], "refusal": None}
        return {
            "tokens": [self._text(token.note.token) for token in tokens],
            "token_logprobs": [_finite(token.note.logprob) for token in tokens],
            "top_logprobs": [{self._text(one): _finite(p) for one, p in token.note.top} for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _chat_token(self, event: TokenEvent) -> Json:
        top = [self._token(token, logprob) for token, logprob in event.top]
        return {**self._token(event.token, event.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float | None) -> Json:
        piece = self.pieces.piece(token, special=True)
        return {"token": piece.decode("utf-8", "replace"), "bytes": list(piece), "logprob": _finite(logprob)}

    def _text(self, token: int) -> str:
        return self.pieces.piece(token, special=True).decode("utf-8", "replace")


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _finite(logprob: float | None) -> float:
    return IMPOSSIBLE_LOGPROB if logprob is None or logprob < IMPOSSIBLE_LOGPROB else float(logprob)


def _stop(found: str | None) -> Mapping[str, str]:
    """vLLM's field for the stop string that ended a choice; OpenAI's own API has none."""
    return {} if found is None else {"stop_reason": found}


_NO_END: Mapping[str, None] = {"logprobs": None, "finish_reason": None}
