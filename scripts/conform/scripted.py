"""A model whose answers are known beforehand, as a program: OpenAI's dialect on a port of the loopback.

It calls the first tool on offer until it was given a result, fills schemas with plain values, and says the same words
otherwise: tests of clients ask whether an answer has its form, and small models are no good for that.
"""

import argparse
import asyncio
import re
import socket
from collections.abc import Mapping
from typing import Any, Final

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from appliance.wire.openai.stream import write_chat_stream

MODEL: Final = "scripted"
WORDS: Final = "Hello, here is an answer in a few words."


async def chat(request: Request) -> Response:
    body = orjson.loads(await request.body())
    payload = reply_to(body)
    if body.get("stream"):
        return Response(b"".join(write_chat_stream(payload, body)), media_type="text/event-stream")
    return JSONResponse(payload)


def reply_to(body: Mapping[str, Any]) -> dict[str, Any]:
    message, finish = _message(body)
    prompt = max(1, len(orjson.dumps(body["messages"])) // 4)
    answer = max(1, len(orjson.dumps(message)) // 4)
    usage = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    return {
        "id": "chatcmpl-scripted",
        "object": "chat.completion",
        "created": 1_790_000_000,
        "model": body["model"],
        "choices": [choice],
        "usage": usage,
    }


def _message(body: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    tool = _tool(body)
    if tool is not None:
        arguments = value_of(tool.get("parameters") or {}, _question(body))
        function = {"name": tool["name"], "arguments": orjson.dumps(arguments).decode()}
        call = {"id": f"call_{len(body['messages'])}", "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}, "tool_calls"
    return {"role": "assistant", "content": _text(body)}, "stop"


def _text(body: Mapping[str, Any]) -> str:
    wanted = body.get("response_format") or {}
    if wanted.get("type") == "json_schema":
        return orjson.dumps(value_of(wanted["json_schema"]["schema"], _question(body))).decode()
    if wanted.get("type") == "json_object":
        return '{"setup": "Why?", "punchline": "Because."}'
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    return re.split("|".join(map(re.escape, stops)), WORDS)[0] if stops else WORDS


def _tool(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The tool that is to be called now, or None."""
    tools, choice = body.get("tools") or [], body.get("tool_choice", "auto")
    if not tools or choice == "none":
        return None
    if isinstance(choice, dict):
        name = choice["function"]["name"]
        named: Mapping[str, Any] = next(one["function"] for one in tools if one["function"]["name"] == name)
        return named
    has_result = body["messages"][-1]["role"] == "tool"
    function: Mapping[str, Any] = tools[0]["function"]
    return function if choice == "required" or not has_result else None


def _question(body: Mapping[str, Any]) -> str:
    return orjson.dumps(body["messages"][-1].get("content")).decode()


def value_of(schema: Mapping[str, Any], question: str, root: Mapping[str, Any] | None = None) -> Any:
    """A value that the schema allows; numbers are taken from the question where it has some."""
    root = schema if root is None else root
    if "$ref" in schema:
        inside: Any = root
        for step in schema["$ref"].removeprefix("#/").split("/"):
            inside = inside[step]
        return value_of(inside, question, root)
    if "enum" in schema:
        return schema["enum"][0]
    for word in ("anyOf", "oneOf", "allOf"):
        if schema.get(word):
            return value_of(schema[word][0], question, root)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        return {name: value_of(part, question, root) for name, part in (schema.get("properties") or {}).items()}
    if kind == "array":
        return [value_of(schema.get("items") or {}, question, root)]
    numbers = re.findall(r"\d+", question)
    number = int(numbers[0]) if numbers else 3
    plain: Mapping[str, Any] = {"integer": number, "number": number, "boolean": True, "null": None}
    return plain.get(kind, "".join(re.findall(r"[^\x00-\x7f]+", question)) or "green")


async def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", arguments.port))
        listener.listen(64)
        print(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", flush=True)
        await uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none")).serve([listener])


if __name__ == "__main__":
    asyncio.run(_main())
