"""A stand-in for OpenAI's chat completions and responses, built with the official SDK's types."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import orjson
from openai.types import CompletionUsage, responses
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming,
    CompletionCreateParamsStreaming,
)
from openai.types.responses.response_create_params import (
    ResponseCreateParamsNonStreaming,
    ResponseCreateParamsStreaming,
)
from pydantic import BaseModel, TypeAdapter

from tests.providers.served import Served, Speech, typed_wrongs
from tests.providers.speech import Called, Cut, Fail, Say, pieces_of

CHAT: Final[Mapping[bool, TypeAdapter[Any]]] = {
    False: TypeAdapter(CompletionCreateParamsNonStreaming),
    True: TypeAdapter(CompletionCreateParamsStreaming),
}
RESPONSES: Final[Mapping[bool, TypeAdapter[Any]]] = {
    False: TypeAdapter(ResponseCreateParamsNonStreaming),
    True: TypeAdapter(ResponseCreateParamsStreaming),
}
_FINISHES: Final = {"stop": "stop", "length": "length", "refusal": "stop"}
ENCRYPTED = "gAAAAAB-encrypted"


class OpenaiApi(Served):
    """`key_header`: where it wants its key. `own` are fields that it takes beyond the SDK's (or does not)."""

    key_header = "authorization"
    own: frozenset[str] = frozenset()

    def wrong_with(self, path: str, body: dict[str, Any]) -> Iterable[str]:
        key = self.headers[-1].get(self.key_header, "")
        if key.removeprefix("Bearer ") != "sk-secret":
            yield f"no {self.key_header}"
        known = {name: value for name, value in body.items() if name not in self.own}
        adapters = RESPONSES if path.endswith("/responses") else CHAT
        yield from typed_wrongs(adapters[bool(body.get("stream"))], known)

    def misunderstood(self, said: str) -> Fail:
        return Fail(400, "invalid_request_error", said)

    def error(self, fail: Fail) -> Any:
        return {"error": {"message": fail.message, "type": fail.kind, "param": None, "code": fail.kind}}

    def whole(self, path: str, body: Mapping[str, Any], say: Say) -> bytes:
        if path.endswith("/responses"):
            return response_of(body, say).to_json().encode()
        completion = ChatCompletion.model_validate(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1_790_000_000,
                "model": body["model"],
                "choices": [
                    {"index": index, "message": _message(say), "finish_reason": _finish(say), "logprobs": None}
                    for index in range(body.get("n") or 1)
                ],
                "usage": _usage(say),
            }
        )
        return completion.to_json().encode()

    def events(self, path: str, body: Mapping[str, Any], speech: Speech) -> Iterable[bytes]:
        say = speech if isinstance(speech, Say) else Say(text=getattr(speech, "text", "so far"))
        pieces = _response_events(body, say) if path.endswith("/responses") else _chunks(body, say)
        for number, event in enumerate(pieces):
            if not isinstance(speech, Say) and number == 3:
                break
            yield event
        if isinstance(speech, Fail):
            error = self.error(speech)
            if path.endswith("/responses"):
                error = {
                    "type": "error",
                    "sequence_number": 9,
                    "code": speech.kind,
                    "message": speech.message,
                    "param": None,
                }
            yield b"data: " + orjson.dumps(error) + b"\n\n"
        elif not isinstance(speech, Cut) and not path.endswith("/responses"):
            yield b"data: [DONE]\n\n"


def _finish(say: Say) -> str:
    return "tool_calls" if say.calls else _FINISHES[say.finish]


def _message(say: Say) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": say.text or None, "refusal": say.refusal or None}
    if say.calls:
        message["tool_calls"] = [_call(call) for call in say.calls]
    return message


def _call(call: Called) -> dict[str, Any]:
    arguments = orjson.dumps(call.arguments).decode()
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _usage(say: Say) -> dict[str, Any]:
    usage = CompletionUsage.model_validate(
        {
            "prompt_tokens": say.prompt_tokens,
            "completion_tokens": say.output_tokens,
            "total_tokens": say.prompt_tokens + say.output_tokens,
            "prompt_tokens_details": {"cached_tokens": say.cached_tokens, "cache_write_tokens": say.written_tokens},
            "completion_tokens_details": {"reasoning_tokens": say.thought_tokens},
        }
    )
    return usage.to_dict()


def _chunks(body: Mapping[str, Any], say: Say) -> Iterator[bytes]:
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": piece} for piece in say.pieces]
    deltas += [{"refusal": piece} for piece in pieces_of(say.refusal)]
    for index, call in enumerate(say.calls):
        whole = _call(call)
        arguments = whole["function"].pop("arguments")
        deltas.append({"tool_calls": [{"index": index, **whole, "function": {**whole["function"], "arguments": ""}}]})
        deltas += [{"tool_calls": [{"index": index, "function": {"arguments": part}}]} for part in pieces_of(arguments)]
    for delta in deltas:
        yield _chunk(body, [{"index": 0, "delta": delta, "finish_reason": None}])
    yield _chunk(body, [{"index": 0, "delta": {}, "finish_reason": _finish(say)}])
    if (body.get("stream_options") or {}).get("include_usage"):
        yield _chunk(body, [], usage=_usage(say))


def _chunk(body: Mapping[str, Any], choices: Sequence[Any], **more: Any) -> bytes:
    chunk = ChatCompletionChunk.model_validate(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1_790_000_000,
            "model": body["model"],
            "choices": choices,
            **more,
        }
    )
    return b"data: " + orjson.dumps(chunk.to_dict()) + b"\n\n"


def response_of(body: Mapping[str, Any], say: Say) -> responses.Response:
    output: list[dict[str, Any]] = []
    if say.thought:
        output.append(
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [{"type": "summary_text", "text": say.thought}],
                "encrypted_content": ENCRYPTED,
            }
        )
    content = [{"type": "output_text", "text": say.text, "annotations": []}] if say.text else []
    content += [{"type": "refusal", "refusal": say.refusal}] if say.refusal else []
    if content:
        output.append(
            {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": content}
        )
    for call in say.calls:
        arguments = orjson.dumps(call.arguments).decode()
        item = {"type": "function_call", "id": f"fc_{call.id}", "call_id": call.id, "name": call.name}
        output.append({**item, "arguments": arguments, "status": "completed"})
    is_short = say.finish == "length"
    return responses.Response.model_validate(
        {
            "id": "resp_1",
            "object": "response",
            "created_at": 1_790_000_000.0,
            "model": body["model"],
            "output": output,
            "status": "incomplete" if is_short else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_short else None,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "usage": {
                "input_tokens": say.prompt_tokens,
                "input_tokens_details": {"cached_tokens": say.cached_tokens, "cache_write_tokens": say.written_tokens},
                "output_tokens": say.output_tokens,
                "output_tokens_details": {"reasoning_tokens": say.thought_tokens},
                "total_tokens": say.prompt_tokens + say.output_tokens,
            },
        }
    )


def _response_events(body: Mapping[str, Any], say: Say) -> Iterator[bytes]:
    response = response_of(body, say)
    numbers = iter(range(1_000_000))

    def event(model: type[BaseModel], **fields: Any) -> bytes:
        made = model.model_validate({**fields, "sequence_number": next(numbers)})
        data = made.model_dump_json(exclude_unset=True)
        return f"event: {fields['type']}\ndata: {data}\n\n".encode()

    begun = response.model_copy(update={"output": [], "usage": None, "status": "in_progress"})
    yield event(responses.ResponseCreatedEvent, type="response.created", response=begun.to_dict())
    for index, item in enumerate(response.output):
        fields: dict[str, Any] = {"output_index": index, "item_id": item.id}
        whole = item.to_dict()
        empty = {**whole, **{name: "" for name in ("arguments",) if name in whole}}
        empty |= {name: [] for name in ("content", "summary") if name in whole}
        yield event(
            responses.ResponseOutputItemAddedEvent, type="response.output_item.added", output_index=index, item=empty
        )
        yield from _item_events(event, item, fields)
        yield event(
            responses.ResponseOutputItemDoneEvent, type="response.output_item.done", output_index=index, item=whole
        )
    kind = "response.incomplete" if response.status == "incomplete" else "response.completed"
    model = responses.ResponseIncompleteEvent if response.status == "incomplete" else responses.ResponseCompletedEvent
    yield event(model, type=kind, response=response.to_dict())


def _item_events(event: Any, item: Any, fields: Mapping[str, Any]) -> Iterator[bytes]:
    match item.type:
        case "reasoning":
            for piece in pieces_of(item.summary[0].text):
                yield event(
                    responses.ResponseReasoningSummaryTextDeltaEvent,
                    type="response.reasoning_summary_text.delta",
                    summary_index=0,
                    delta=piece,
                    **fields,
                )
        case "function_call":
            for piece in pieces_of(item.arguments):
                yield event(
                    responses.ResponseFunctionCallArgumentsDeltaEvent,
                    type="response.function_call_arguments.delta",
                    delta=piece,
                    **fields,
                )
        case "message":
            for position, part in enumerate(item.content):
                where = {**fields, "content_index": position}
                if part.type == "output_text":
                    for piece in pieces_of(part.text):
                        yield event(
                            responses.ResponseTextDeltaEvent,
                            type="response.output_text.delta",
                            delta=piece,
                            logprobs=[],
                            **where,
                        )
                else:
                    yield event(
                        responses.ResponseRefusalDeltaEvent,
                        type="response.refusal.delta",
                        delta=part.refusal,
                        **where,
                    )
