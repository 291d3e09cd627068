"""A chat's stream as the events of OpenAI's Responses, numbered: items one after the other, each with its parts."""

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from appliance.errors import ApplianceError
from appliance.wire.chat_stream import reasoning_of
from appliance.wire.responses.inbound_reply import (
    Item,
    ResponseItemIds,
    call_item,
    ended,
    foreign_of_any,
    head_of,
    logprobs_of,
    message_item,
    reasoning_item,
    summary_of,
    text_part,
)


class ResponsesStreamWriter:
    """`original`: the body that asked. This API repeats each part whole at its end, so its text is kept until then."""

    def __init__(self, original: Mapping[str, Any]) -> None:
        self._original = original
        self._is_summary = summary_of(original) is not None
        self._head: dict[str, Any] | None = None
        self._names = ResponseItemIds("")
        self._number = 0
        self._items: list[Item] = []
        self._open: _Reasoning | _Text | _Call | None = None
        self._calls = 0
        self._choice: Mapping[str, Any] = {}
        self._usage: Any = None

    def feed(self, chunk: Mapping[str, Any]) -> bytes:
        out = b"" if self._head is not None else self._begin(chunk)
        if isinstance(chunk.get("usage"), dict):
            self._usage = chunk["usage"]
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta")
            if delta:
                out += self._delta(delta, choice)
            if choice.get("finish_reason"):
                self._choice = choice
        return out

    def end(self) -> bytes:
        out = b"" if self._head is not None else self._begin({})
        assert self._head is not None
        out += self._close()
        if not self._items:
            out += self._start(lambda: _Text(self, self._names.next("msg"), "output_text")) + self._close()
        response = ended(self._head, self._items, self._choice, self._usage)
        return out + self.event(f"response.{response['status']}", response=response)

    def fail(self, error: ApplianceError) -> bytes:
        out = self.event("error", code=error.code, message=error.message, param=error.param)
        if self._head is None:
            return out
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        failed = {
            **self._head,
            "status": "failed",
            "error": {"code": code, "message": error.message},
            "output": self._items,
        }
        return out + self.event("response.failed", response=failed)

    def event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"

    @property
    def place(self) -> int:
        """Of the item that is open."""
        return len(self._items)

    def _begin(self, chunk: Mapping[str, Any]) -> bytes:
        self._head = head_of(chunk, self._original)
        self._names = ResponseItemIds(self._head["id"])
        return self.event("response.created", response=self._head) + self.event(
            "response.in_progress", response=self._head
        )

    def _delta(self, delta: Mapping[str, Any], choice: Mapping[str, Any]) -> bytes:
        foreign = foreign_of_any(delta)
        out = self._think(reasoning_of(delta), foreign)
        text, refusal = delta.get("content"), delta.get("refusal")
        if isinstance(text, str) and text:
            out += self._say("output_text", text, logprobs_of(choice))
        if isinstance(refusal, str) and refusal:
            out += self._say("refusal", refusal, [])
        for call in delta.get("tool_calls") or ():
            out += self._call(call)
        return out

    def _think(self, text: str, foreign: Mapping[str, Any]) -> bytes:
        if not text and not foreign:
            return b""
        out = b""
        if not isinstance(self._open, _Reasoning):
            out += self._start(lambda: _Reasoning(self, self._names.next("rs"), self._is_summary))
        assert isinstance(self._open, _Reasoning)
        self._open.keep(foreign)
        return out + (self._open.add(text) if text else b"")

    def _say(self, kind: str, text: str, logprobs: list[Item]) -> bytes:
        out = b""
        if not isinstance(self._open, _Text) or self._open.kind != kind:
            out += self._start(lambda: _Text(self, self._names.next("msg"), kind))
        assert isinstance(self._open, _Text)
        return out + self._open.add(text, logprobs)

    def _call(self, call: Mapping[str, Any]) -> bytes:
        number = call.get("index")
        if number is None:  # some servers send each call whole, without one
            number = self._calls if call.get("id") else self._calls - 1
        function = call.get("function") or {}
        out = b""
        if not isinstance(self._open, _Call) or number != self._calls - 1:
            if number < self._calls:
                raise ValueError("a tool call goes on after the next one began")
            self._calls = number + 1
            name = self._names.next("fc")
            out += self._start(lambda: _Call(self, name, str(call.get("id") or ""), str(function["name"])))
        assert isinstance(self._open, _Call)
        arguments = function.get("arguments")
        return out + self._open.add(arguments) if arguments else out

    def _start(self, make: Callable[[], "_Reasoning | _Text | _Call"]) -> bytes:
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
        self._foreign: dict[str, Any] = {}
        self._at = {"item_id": name, "output_index": writer.place}
        self._at["summary_index" if is_summary else "content_index"] = 0
        self._kind = "response.reasoning_summary" if is_summary else "response.reasoning"
        self._part_kind = "response.reasoning_summary_part" if is_summary else "response.content_part"

    def begin(self) -> bytes:
        item = {**reasoning_item(self._name, "", self._is_summary, {}), "status": "in_progress"}
        return self._writer.event("response.output_item.added", output_index=self._at["output_index"], item=item)

    def keep(self, foreign: Mapping[str, Any]) -> None:
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
        return out, reasoning_item(self._name, text, self._is_summary, self._foreign)

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
        item = message_item(self._name, (), "in_progress")
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
        return out, message_item(self._name, (part,))

    def _part(self, text: str) -> Item:
        return {"type": "refusal", "refusal": text} if self.kind == "refusal" else text_part(text, self._logprobs)


class _Call:
    def __init__(self, writer: ResponsesStreamWriter, name: str, call_id: str, function: str) -> None:
        self._writer, self._name, self._call_id, self._function = writer, name, call_id, function
        self._texts: list[str] = []
        self._at = {"item_id": name, "output_index": writer.place}

    def begin(self) -> bytes:
        item = call_item(self._name, self._call_id, self._function, "", "in_progress")
        return self._writer.event("response.output_item.added", output_index=self._at["output_index"], item=item)

    def add(self, text: str) -> bytes:
        self._texts.append(text)
        return self._writer.event("response.function_call_arguments.delta", **self._at, delta=text)

    def end(self) -> tuple[bytes, Item]:
        text = "".join(self._texts) or "{}"
        done = self._writer.event(
            "response.function_call_arguments.done", **self._at, name=self._function, arguments=text
        )
        return done, call_item(self._name, self._call_id, self._function, text)
