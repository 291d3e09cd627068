"""The official SDKs as one kind of client: a question is asked in each one's words, and heard in the same few."""

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import anthropic
import httpx2
import openai

from tests.google_sdk import errors as google_errors
from tests.google_sdk import genai, types

Inbound = Literal["chat", "responses", "messages", "gemini"]
INBOUND: tuple[Inbound, ...] = ("chat", "responses", "messages", "gemini")
PIXEL = "iVBORw0KGgo="
SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}


@dataclass
class Question:
    """What is asked. `result`: what a tool that was called before has answered."""

    text: str = "How is the weather in Ulm?"
    has_image: bool = False
    has_tool: bool = False
    result: str | None = None
    stream: bool = False


@dataclass
class Heard:
    """What the SDK made of the answer. `end` is the dialect's own word for why it ended."""

    text: str = ""
    refusal: str = ""
    thought: str = ""
    calls: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    end: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0


ENDS: Mapping[Inbound, Mapping[str, tuple[str, ...]]] = {
    "chat": {"stop": ("stop",), "length": ("length",), "tool": ("tool_calls",), "refusal": ("stop", "content_filter")},
    "responses": {
        "stop": ("completed",),
        "length": ("max_output_tokens",),
        "tool": ("completed",),
        "refusal": ("completed", "content_filter"),
    },
    "messages": {
        "stop": ("end_turn",),
        "length": ("max_tokens",),
        "tool": ("tool_use",),
        "refusal": ("refusal",),
    },
    "gemini": {"stop": ("STOP",), "length": ("MAX_TOKENS",), "tool": ("STOP",), "refusal": ("SAFETY", "STOP")},
}
"""How each dialect says why an answer ended."""

FAILURES: Mapping[Inbound, type[Exception]] = {
    "chat": openai.APIError,
    "responses": openai.APIError,
    "messages": anthropic.APIError,
    "gemini": google_errors.APIError,
}


@contextlib.asynccontextmanager
async def asking(inbound: Inbound, url: str) -> AsyncIterator[Callable[[Question], Any]]:
    """Gives `await ask(question) -> Heard`, which raises the SDK's own errors."""
    async with AsyncExitStack() as stack:
        yield await _MADE[inbound](stack, url)


async def _chat(stack: AsyncExitStack, url: str) -> Callable[[Question], Any]:
    client = await stack.enter_async_context(openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))

    async def ask(question: Question) -> Heard:
        content: Any = question.text
        if question.has_image:
            address = {"url": f"data:image/png;base64,{PIXEL}"}
            content = [{"type": "text", "text": question.text}, {"type": "image_url", "image_url": address}]
        messages: list[Any] = [{"role": "user", "content": content}]
        if question.result is not None:
            called = {"name": "weather", "arguments": '{"city":"Ulm"}'}
            call = {"id": "call_1", "type": "function", "function": called}
            messages += [{"role": "assistant", "content": None, "tool_calls": [call]}]
            messages += [{"role": "tool", "tool_call_id": "call_1", "content": question.result}]
        tool = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
        body: dict[str, Any] = {"model": "auto", "messages": messages, "max_tokens": 2000}
        body |= {"tools": [tool]} if question.has_tool else {}
        if question.stream:
            async with client.chat.completions.stream(**body, stream_options={"include_usage": True}) as events:
                async for _ in events:
                    pass
                done: Any = _without_parsing(events)
        else:
            done = await client.chat.completions.create(**body)
        choice = done.choices[0]
        calls = [(one.function.name, _json(one.function.arguments)) for one in choice.message.tool_calls or ()]
        return Heard(
            choice.message.content or "",
            choice.message.refusal or "",
            (choice.message.model_extra or {}).get("reasoning_content") or "",
            calls,
            choice.finish_reason,
            done.usage.prompt_tokens,
            done.usage.completion_tokens,
        )

    return ask


def _without_parsing(events: Any) -> Any:
    """The SDK's own last step raises for an answer that its length cut off."""
    return events._state.current_completion_snapshot


async def _responses(stack: AsyncExitStack, url: str) -> Callable[[Question], Any]:
    client = await stack.enter_async_context(openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))

    async def ask(question: Question) -> Heard:
        parts: list[Any] = [{"type": "input_text", "text": question.text}]
        if question.has_image:
            image = f"data:image/png;base64,{PIXEL}"
            parts += [{"type": "input_image", "detail": "auto", "image_url": image}]
        items: list[Any] = [{"role": "user", "content": parts}]
        if question.result is not None:
            items += [{"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city":"Ulm"}'}]
            items += [{"type": "function_call_output", "call_id": "call_1", "output": question.result}]
        tool = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}
        body: dict[str, Any] = {"model": "auto", "input": items, "max_output_tokens": 2000}
        body |= {"reasoning": {"summary": "auto"}}
        body |= {"tools": [tool]} if question.has_tool else {}
        if question.stream:
            last = None
            async for event in await client.responses.create(**body, stream=True):
                if event.type in ("response.completed", "response.incomplete"):
                    last = event.response
                elif event.type in ("error", "response.failed"):
                    raise _failed(event)
            assert last is not None, "the stream ended without saying so"
            done: Any = last
        else:
            done = await client.responses.create(**body)
        heard = Heard(end=done.incomplete_details.reason if done.incomplete_details else done.status)
        for item in done.output:
            _hear_item(heard, item)
        heard.prompt_tokens, heard.output_tokens = done.usage.input_tokens, done.usage.output_tokens
        return heard

    return ask


def _failed(event: Any) -> openai.APIError:
    """The SDK gives such an event to its caller, who has to raise."""
    error = event.response.error if event.type == "response.failed" else event
    return openai.APIError(error.message, httpx2.Request("POST", "http://node"), body=None)


def _hear_item(heard: Heard, item: Any) -> None:
    if item.type == "function_call":
        heard.calls.append((item.name, _json(item.arguments)))
    elif item.type == "reasoning":
        heard.thought += "".join(part.text for part in item.summary)
    else:
        for part in item.content:
            if part.type == "refusal":
                heard.refusal += part.refusal
            else:
                heard.text += part.text


async def _messages(stack: AsyncExitStack, url: str) -> Callable[[Question], Any]:
    client = await stack.enter_async_context(anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0))

    async def ask(question: Question) -> Heard:
        blocks: list[Any] = [{"type": "text", "text": question.text}]
        if question.has_image:
            source = {"type": "base64", "media_type": "image/png", "data": PIXEL}
            blocks.append({"type": "image", "source": source})
        messages: list[Any] = [{"role": "user", "content": blocks}]
        if question.result is not None:
            call = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Ulm"}}
            told = {"type": "tool_result", "tool_use_id": "call_1", "content": question.result}
            messages += [{"role": "assistant", "content": [call]}, {"role": "user", "content": [told]}]
        body: dict[str, Any] = {"model": "auto", "max_tokens": 2000, "messages": messages}
        body |= {"tools": [{"name": "weather", "input_schema": SCHEMA}]} if question.has_tool else {}
        if question.stream:
            async with client.messages.stream(**body) as events:
                done: Any = await events.get_final_message()
        else:
            done = await client.messages.create(**body)
        usage = done.usage
        read = (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
        heard = Heard(end=done.stop_reason, prompt_tokens=usage.input_tokens + read, output_tokens=usage.output_tokens)
        for block in done.content:
            if block.type == "tool_use":
                heard.calls.append((block.name, block.input))
            elif block.type == "thinking":
                heard.thought += block.thinking
            elif block.type == "text":
                heard.text += block.text
        if done.stop_reason == "refusal":
            said = heard.text or (done.stop_details.explanation if done.stop_details else "")
            heard.text, heard.refusal = "", said
        return heard

    return ask


async def _gemini(stack: AsyncExitStack, url: str) -> Callable[[Question], Any]:
    client = genai.Client(api_key="none", http_options=types.HttpOptions(base_url=url))
    stack.callback(client.close)
    stack.push_async_callback(client.aio.aclose)

    async def ask(question: Question) -> Heard:
        parts: list[Any] = [{"text": question.text}]
        if question.has_image:
            parts.append({"inline_data": {"mime_type": "image/png", "data": PIXEL}})
        contents: list[Any] = [{"role": "user", "parts": parts}]
        if question.result is not None:
            call = {"function_call": {"name": "weather", "args": {"city": "Ulm"}}}
            told = {"function_response": {"name": "weather", "response": {"result": question.result}}}
            contents += [{"role": "model", "parts": [call]}, {"role": "user", "parts": [told]}]
        declared = {"name": "weather", "parameters_json_schema": SCHEMA}
        config: dict[str, Any] = {"max_output_tokens": 2000, "thinking_config": {"include_thoughts": True}}
        config |= {"tools": [{"function_declarations": [declared]}]} if question.has_tool else {}
        asked: Any = {"model": "auto", "contents": contents, "config": types.GenerateContentConfig(**config)}
        heard = Heard()
        if question.stream:
            async for piece in await client.aio.models.generate_content_stream(**asked):
                _hear_piece(heard, piece)
        else:
            _hear_piece(heard, await client.aio.models.generate_content(**asked))
        if heard.end == "SAFETY":
            heard.text, heard.refusal = "", heard.text
        return heard

    return ask


def _hear_piece(heard: Heard, piece: Any) -> None:
    feedback = piece.prompt_feedback
    if feedback and feedback.block_reason:
        heard.end, heard.text = feedback.block_reason.name, feedback.block_reason_message
    for candidate in piece.candidates or ():
        heard.end = candidate.finish_reason.name if candidate.finish_reason else heard.end
        for part in (candidate.content and candidate.content.parts) or ():
            if part.function_call:
                heard.calls.append((part.function_call.name, part.function_call.args))
            elif part.thought:
                heard.thought += part.text or ""
            else:
                heard.text += part.text or ""
    if piece.usage_metadata:
        heard.prompt_tokens = piece.usage_metadata.prompt_token_count or 0
        spoken = (piece.usage_metadata.candidates_token_count or 0) + (piece.usage_metadata.thoughts_token_count or 0)
        heard.output_tokens = spoken


def _json(text: str) -> Any:
    import json

    return json.loads(text)


_MADE: Mapping[Inbound, Callable[[AsyncExitStack, str], Any]] = {
    "chat": _chat,
    "responses": _responses,
    "messages": _messages,
    "gemini": _gemini,
}
