"""Streams of OpenAI's Responses: a target's read into chunks of a chat, a chat's written for a caller.

Events are numbered; items come one after the other, each with its parts.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.errors import ApplianceError
from appliance.wire.chat_ir import ChatChoice, ChatChunk, ChatDelta, reasoning_text, wants_usage
from appliance.wire.dialect import WireRequest
from appliance.wire.opaque_state import foreign_state
from appliance.wire.responses.reply import (
    Item,
    ResponseItemIds,
    finish_response,
    make_call_item,
    make_message_item,
    make_reasoning_item,
    make_text_part,
    read_finish_reason,
    read_function_call,
    read_reasoning,
    summary_kind,
    write_head,
    write_logprobs,
)
from appliance.wire.sse import write_event
from appliance.wire.streams import ChunkTranslator, ItemStreamWriter, StreamStart
from appliance.wire.usage import read_usage


class ResponsesStreamTranslator(ChunkTranslator):
    """The events of one response. Text, refusal, thought and arguments are passed on as they come."""

    def __init__(self, request: WireRequest) -> None:
        super().__init__(request.target.model, keep_usage=wants_usage(request.outgoing.body))
        self._calls: dict[int, int] = {}
        """Output item -> index of the tool call."""
        self._thought = 0

    def _take(self, event: JsonObject) -> Iterator[bytes]:
        match event.get("type"):
            case "response.created":
                response = event.get("response") or {}
                self.identity = str(response.get("id") or "")
                self._model = str(response.get("model") or self._model)
                yield self._chunk({"role": "assistant", "content": ""})
            case "response.completed" | "response.incomplete":
                yield from self._ends(event.get("response") or {})
            case "response.failed":
                self.error = (event.get("response") or {}).get("error") or {"message": "the response failed"}
            case "error":
                self.error = {name: event.get(name) for name in ("message", "code", "param")}
            case _:
                yield from self._take_output(event)

    def _take_output(self, event: JsonObject) -> Iterator[bytes]:
        position, said = event.get("output_index", 0), event.get("delta", "")
        match event.get("type"):
            case "response.output_text.delta":
                scored = event.get("logprobs")
                more: ChatChoice = {"logprobs": {"content": scored, "refusal": None}} if scored else {}
                yield self._chunk({"content": said}, more=more)
            case "response.refusal.delta":
                yield self._chunk({"refusal": said})
            case "response.reasoning_summary_text.delta" | "response.reasoning_text.delta":
                yield self._chunk({"reasoning_content": said})
            case "response.output_item.added":
                yield from self._item_added(position, event.get("item") or {})
            case "response.function_call_arguments.delta" if position in self._calls:
                yield self._chunk({"tool_calls": [{"index": self._calls[position], "function": {"arguments": said}}]})
            case "response.output_item.done":
                item = event.get("item") or {}
                if item.get("type") == "reasoning":
                    yield self._chunk({"thinking_blocks": [{"index": self._thought, **read_reasoning(item)}]})
                    self._thought += 1

    def _item_added(self, position: int, item: JsonObject) -> Iterator[bytes]:
        if item.get("type") != "function_call":
            return
        number = self._calls[position] = len(self._calls)
        yield self._chunk({"tool_calls": [{"index": number, **read_function_call(item)}]})

    def _ends(self, response: JsonObject) -> Iterator[bytes]:
        self.usage = read_usage(response.get("usage"))
        yield self._chunk({}, finish=read_finish_reason(response, bool(self._calls)))
        yield self._finish()


class ResponsesStreamWriter(ItemStreamWriter):
    """This API repeats each part whole at its end, so its text is kept until then."""

    def __init__(self, start: StreamStart) -> None:
        super().__init__(start)
        self._is_summary = summary_kind(start.original) is not None
        self._head: JsonObject = {}
        self._names = ResponseItemIds("")
        self._number = 0
        self._items: list[Item] = []
        self._open: OpenItem | None = None

    def end(self) -> bytes:
        out = self._begin_once({}) + self._close()
        if not self._items:
            out += self._start(lambda: _Text(self, self._names.next("msg"), "output_text")) + self._close()
        response = finish_response(self._head, self._items, self._choice, self._usage)
        return out + self.event(f"response.{response['status']}", response=response)

    def fail(self, error: ApplianceError) -> bytes:
        out = self.event("error", code=error.code, message=error.message, param=error.param)
        if not self._head:
            return out
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        failed = {
            **self._head,
            "status": "failed",
            "error": {"code": code, "message": error.message},
            "output": self._items,
        }
        return out + self.event("response.failed", response=failed)

    def event(self, kind: str, **fields: object) -> bytes:
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return write_event(data, kind)

    @property
    def place(self) -> int:
        """Of the item that is open."""
        return len(self._items)

    def _begin(self, chunk: ChatChunk) -> bytes:
        self._head = write_head(chunk, self._original)
        self._names = ResponseItemIds(self._head["id"])
        return self.event("response.created", response=self._head) + self.event(
            "response.in_progress", response=self._head
        )

    def _think(self, delta: ChatDelta) -> bytes:
        text, foreign = reasoning_text(delta), foreign_state(delta)
        if not text and not foreign:
            return b""
        out = b""
        if not isinstance(self._open, _Reasoning):
            out += self._start(lambda: _Reasoning(self, self._names.next("rs"), self._is_summary))
        assert isinstance(self._open, _Reasoning)
        self._open.keep(foreign)
        return out + (self._open.add(text) if text else b"")

    def _say(self, text: str, choice: ChatChoice) -> bytes:
        return self._add_text("output_text", text, write_logprobs(choice))

    def _refuse(self, text: str) -> bytes:
        return self._add_text("refusal", text, [])

    def _add_text(self, kind: str, text: str, logprobs: list[Item]) -> bytes:
        out = b""
        if not isinstance(self._open, _Text) or self._open.kind != kind:
            out += self._start(lambda: _Text(self, self._names.next("msg"), kind))
        assert isinstance(self._open, _Text)
        return out + self._open.add(text, logprobs)

    def _is_in_call(self) -> bool:
        return isinstance(self._open, _Call)

    def _begin_call(self, call_id: str, name: str) -> bytes:
        return self._start(lambda: _Call(self, self._names.next("fc"), call_id, name))

    def _add_arguments(self, text: str) -> bytes:
        assert isinstance(self._open, _Call)
        return self._open.add(text)

    def _start(self, make: "Callable[[], OpenItem]") -> bytes:
        """Items know their place when they are made, so the one before is closed first."""
        out = self._close()
        self._open = make()
        return out + self._open.begin()

    def _close(self) -> bytes:
        item, self._open = self._open, None
        if item is None:
            return b""
        out, done = item.end()
        out += self.event("response.output_item.done", output_index=self.place, item=done)
        self._items.append(done)
        return out


class _Reasoning:
    def __init__(self, writer: ResponsesStreamWriter, name: str, is_summary: bool) -> None:
        self._writer, self._name, self._is_summary = writer, name, is_summary
        self._texts: list[str] = []
        self._foreign: MutableJsonObject = {}
        self._at = {"item_id": name, "output_index": writer.place}
        self._at["summary_index" if is_summary else "content_index"] = 0
        self._kind = "response.reasoning_summary" if is_summary else "response.reasoning"
        self._part_kind = "response.reasoning_summary_part" if is_summary else "response.content_part"

    def begin(self) -> bytes:
        item = {**make_reasoning_item(self._name, "", self._is_summary, {}), "status": "in_progress"}
        return self._writer.event("response.output_item.added", output_index=self._at["output_index"], item=item)

    def keep(self, foreign: JsonObject) -> None:
        for name, value in foreign.items():
            held = self._foreign.get(name)
            if isinstance(held, list):
                self._foreign[name] = [*held, *value]
            else:
                self._foreign[name] = {**held, **value} if isinstance(held, dict) else value

    def add(self, text: str) -> bytes:
        opening = (
            b"" if self._texts else self._writer.event(f"{self._part_kind}.added", **self._at, part=self._part(""))
        )
        self._texts.append(text)
        return opening + self._writer.event(f"{self._kind}_text.delta", **self._at, delta=text)

    def end(self) -> tuple[bytes, Item]:
        text = "".join(self._texts)
        out = b""
        if text:
            out += self._writer.event(f"{self._kind}_text.done", **self._at, text=text)
            out += self._writer.event(f"{self._part_kind}.done", **self._at, part=self._part(text))
        return out, make_reasoning_item(self._name, text, self._is_summary, self._foreign)

    def _part(self, text: str) -> Item:
        return {"type": "summary_text" if self._is_summary else "reasoning_text", "text": text}


class _Text:
    """A message of one part: text, or a refusal."""

    def __init__(self, writer: ResponsesStreamWriter, name: str, kind: str) -> None:
        self._writer, self._name, self.kind = writer, name, kind
        self._texts: list[str] = []
        self._logprobs: list[Item] = []
        self._at = {"item_id": name, "output_index": writer.place, "content_index": 0}

    def begin(self) -> bytes:
        item = make_message_item(self._name, (), "in_progress")
        added = self._writer.event("response.output_item.added", output_index=self._at["output_index"], item=item)
        return added + self._writer.event("response.content_part.added", **self._at, part=self._part(""))

    def add(self, text: str, logprobs: list[Item]) -> bytes:
        self._texts.append(text)
        if self.kind == "refusal":
            return self._writer.event("response.refusal.delta", **self._at, delta=text)
        self._logprobs += logprobs
        return self._writer.event("response.output_text.delta", **self._at, delta=text, logprobs=logprobs)

    def end(self) -> tuple[bytes, Item]:
        text = "".join(self._texts)
        part = self._part(text)
        if self.kind == "refusal":
            out = self._writer.event("response.refusal.done", **self._at, refusal=text)
        else:
            out = self._writer.event("response.output_text.done", **self._at, text=text, logprobs=self._logprobs)
        out += self._writer.event("response.content_part.done", **self._at, part=part)
        return out, make_message_item(self._name, (part,))

    def _part(self, text: str) -> Item:
        return {"type": "refusal", "refusal": text} if self.kind == "refusal" else make_text_part(text, self._logprobs)


class _Call:
    def __init__(self, writer: ResponsesStreamWriter, name: str, call_id: str, function: str) -> None:
        self._writer, self._name, self._call_id, self._function = writer, name, call_id, function
        self._texts: list[str] = []
        self._at = {"item_id": name, "output_index": writer.place}

    def begin(self) -> bytes:
        item = make_call_item(self._name, self._call_id, self._function, "", "in_progress")
        return self._writer.event("response.output_item.added", output_index=self._at["output_index"], item=item)

    def add(self, text: str) -> bytes:
        self._texts.append(text)
        return self._writer.event("response.function_call_arguments.delta", **self._at, delta=text)

    def end(self) -> tuple[bytes, Item]:
        text = "".join(self._texts) or "{}"
        done = self._writer.event(
            "response.function_call_arguments.done", **self._at, name=self._function, arguments=text
        )
        return done, make_call_item(self._name, self._call_id, self._function, text)


OpenItem: TypeAlias = _Reasoning | _Text | _Call
