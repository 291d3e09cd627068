"""Runs one call's sequences and gives their text: several prompts, several choices, stop strings, one owner."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Literal, Protocol, Self

from appliance.core.json_types import JsonSchema
from appliance.errors import ApplianceError, EngineFailed, Unavailable
from appliance.llamacpp.chat.reply_parsers import (
    MessagePart,
    MessageReplyParser,
    PlainReplyParser,
    ReplyParser,
    ReplyPieces,
)
from appliance.llamacpp.chat.reply_text import PlacedToken
from appliance.llamacpp.decode.constraints import GrammarCompiler
from appliance.llamacpp.engine_protocol import (
    EngineLoadReport,
    LabelItem,
    LabelScores,
    Sampling,
    SequenceFinished,
    SequenceRequest,
    TokenEvent,
)
from appliance.llamacpp.tools.cursor import ContentDelta, ReasoningDelta, ToolCallArgumentsDelta, ToolCallStart
from appliance.llamacpp.tools.grammar import ReplyGrammarSpec
from appliance.llamacpp.tools.parser import ReplySyntaxes

End = Literal["stop", "length", "tool_calls"]


class SequenceStream(Protocol):
    """One sequence in the engine: iterate for tokens as they come, then read `finished`."""

    @property
    def finished(self) -> SequenceFinished | None: ...

    def __aiter__(self) -> AsyncIterator[list[TokenEvent]]: ...

    def cancel(self) -> None: ...

    async def aclose(self) -> None: ...


class SequenceEngine(Protocol):
    """The scheduler, as the dialect sees it."""

    failed: ApplianceError | None

    def submit(self, request: SequenceRequest) -> SequenceStream: ...

    async def score_labels(self, items: Sequence[LabelItem]) -> list[LabelScores]: ...

    def report_load(self) -> EngineLoadReport: ...


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One checked call: `n` choices for each of `prompts`, in OpenAI's order (all of the first prompt's, then ...)."""

    prompts: Sequence[Sequence[int]]
    n: int
    max_tokens: Sequence[int]
    """By prompt."""
    sampling: Sampling
    stops: Sequence[str] = ()
    logprobs: int | None = None
    schema: JsonSchema | None = None
    grammar: ReplyGrammarSpec | None = None
    """Where the reply may hold calls, or reasoning before JSON; then `schema` is part of them."""
    syntaxes: ReplySyntaxes | None = None
    """None: the reply is text and nothing else."""
    ignore_eos: bool = False
    priority: int = 0
    cache_salt: str = ""
    streamed: bool = True


@dataclass(frozen=True, slots=True)
class GenerationDelta:
    """A step of one choice. `end` is set in its last delta and only there."""

    index: int
    part: MessagePart
    end: End | None = None
    stopped_by: str | None = None
    """The stop string that was the end, where one was."""


@dataclass(slots=True)
class TokenUsage:
    """Tokens of the whole call. A prompt counts once, however many choices it got."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int | None = None
    """None where the model writes no reasoning of its own."""


@dataclass(slots=True)
class WholeReply:
    """A choice, finished once it has an end."""

    text: str = ""
    tokens: list[PlacedToken[TokenEvent]] = field(default_factory=list)
    end: End = "length"
    stopped_by: str | None = None
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    """Name and arguments, as JSON text."""

    def add(self, part: MessagePart) -> None:
        self.text += part.text
        self.tokens += part.tokens
        for event in part.events:
            match event:
                case ContentDelta():
                    self.text += event.text
                case ReasoningDelta():
                    self.reasoning += event.text
                case ToolCallStart():
                    self.calls.append((event.name, ""))
                case ToolCallArgumentsDelta():
                    name, written = self.calls[-1]
                    self.calls[-1] = name, written + event.text


@dataclass(slots=True)
class _Choice:
    index: int
    first_of_prompt: bool
    sequence: SequenceStream
    reader: ReplyParser


class RunningGeneration:
    """The sequences of one call. Its maker closes it in every case: closing frees the sequences in the engine."""

    def __init__(
        self,
        engine: SequenceEngine,
        pieces: ReplyPieces,
        requests: Sequence[SequenceRequest],
        stops: Sequence[str],
        n: int,
        syntaxes: ReplySyntaxes | None = None,
    ) -> None:
        self._engine = engine
        self._choices: list[_Choice] = []
        self.usage = TokenUsage(reasoning_tokens=0 if syntaxes is not None and syntaxes.reasoning is not None else None)
        try:
            for index, request in enumerate(requests):
                sequence = engine.submit(request)
                reader = (
                    PlainReplyParser(pieces, stops) if syntaxes is None else MessageReplyParser(pieces, stops, syntaxes)
                )
                self._choices.append(_Choice(index, index % n == 0, sequence, reader))
        except BaseException:
            self.cancel()
            raise

    @classmethod
    async def start(
        cls, engine: SequenceEngine, pieces: ReplyPieces, grammars: GrammarCompiler | None, request: GenerationRequest
    ) -> Self:
        """Queue all sequences of the call, or none: EngineBusy, ContextTooLong, RequestError (bad schema)."""
        requests: list[SequenceRequest] = []
        for prompt, max_tokens in zip(request.prompts, request.max_tokens, strict=True):
            for number in range(request.n):
                constraint = None
                if request.grammar is not None and grammars is not None:
                    constraint = await asyncio.to_thread(grammars.compile_reply, request.grammar)
                elif request.schema is not None and grammars is not None:
                    constraint = await asyncio.to_thread(grammars.compile, request.schema)
                requests.append(
                    SequenceRequest(
                        prompt=prompt,
                        max_tokens=max_tokens,
                        sampling=_seeded(request.sampling, len(requests) if number else 0),
                        logprobs=request.logprobs,
                        constraint=constraint,
                        ignore_eos=request.ignore_eos,
                        priority=request.priority,
                        cache_salt=request.cache_salt,
                        streamed=request.streamed,
                    )
                )
        return cls(engine, pieces, requests, request.stops, request.n, request.syntaxes)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def cancel(self) -> None:
        for choice in self._choices:
            choice.sequence.cancel()

    async def aclose(self) -> None:
        for choice in self._choices:
            await choice.sequence.aclose()

    async def deltas(self) -> AsyncGenerator[GenerationDelta]:
        """All choices' steps as they come; what one engine step brought for a choice is one delta."""
        if len(self._choices) == 1:
            async for delta in self._steps(self._choices[0]):
                yield delta
            return
        arrived: asyncio.Queue[GenerationDelta | BaseException | None] = asyncio.Queue()
        pumps = [asyncio.create_task(self._pump(choice, arrived)) for choice in self._choices]
        try:
            open_choices = len(pumps)
            while open_choices:
                item = await arrived.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    open_choices -= 1
                else:
                    yield item
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def collect(self) -> list[WholeReply]:
        """All choices, finished, in order."""
        choices = [WholeReply() for _ in self._choices]
        async for delta in self.deltas():
            choices[delta.index].add(delta.part)
            if delta.end is not None:
                choices[delta.index].end = delta.end
                choices[delta.index].stopped_by = delta.stopped_by
        return choices

    async def _pump(self, choice: _Choice, arrived: "asyncio.Queue[GenerationDelta | BaseException | None]") -> None:
        try:
            async for delta in self._steps(choice):
                arrived.put_nowait(delta)
        except Exception as error:  # handed to the reader, who raises it
            arrived.put_nowait(error)
        else:
            arrived.put_nowait(None)

    async def _steps(self, choice: _Choice) -> AsyncIterator[GenerationDelta]:
        reader = choice.reader
        async for events in choice.sequence:
            part = reader.push(events)
            if reader.stopped:
                choice.sequence.cancel()
                # The counts of a cancelled sequence come with its end, at the engine's next step.
                async for _ in choice.sequence:
                    pass
                self._count(choice)
                yield GenerationDelta(choice.index, part, "stop", reader.stopped_by)
                return
            if part:
                yield GenerationDelta(choice.index, part)
        end = self._end(self._count(choice))
        part = reader.close(truncated=end == "length")
        if reader.stopped:
            end = "stop"
        elif reader.called and end == "stop":
            end = "tool_calls"
        yield GenerationDelta(choice.index, part, end, reader.stopped_by)

    def _end(self, finished: SequenceFinished) -> End:
        if finished.reason in ("stop", "length"):
            return finished.reason
        if finished.reason == "cancelled":
            raise Unavailable("the engine is stopping and gave this request up; send it again", retry_after_seconds=5)
        if self._engine.failed is not None:
            raise EngineFailed(f"the engine failed: {self._engine.failed.message}; it is being restarted")
        raise ApplianceError(f"the reply could not be finished: {finished.error or 'no reason known'}")

    def _count(self, choice: _Choice) -> SequenceFinished:
        finished = choice.sequence.finished
        assert finished is not None, "a sequence's iterator ends with its end"
        self.usage.completion_tokens += choice.reader.completion_tokens
        if self.usage.reasoning_tokens is not None:
            self.usage.reasoning_tokens += choice.reader.reasoning_tokens
        if choice.first_of_prompt:
            self.usage.prompt_tokens += finished.prompt_tokens
            self.usage.cached_tokens += finished.cached_tokens
        return finished


def _seeded(sampling: Sampling, number: int) -> Sampling:
    """Choices of one seeded call differ from each other, and stay the same from call to call."""
    return sampling if sampling.seed is None or number == 0 else replace(sampling, seed=sampling.seed + number)
