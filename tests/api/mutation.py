"""Valid bodies of every chat dialect and endless ways of spoiling them, by a seed: for the tests and for longer runs.

A spoiled body may still be valid. Whatever it is, the answer must be a result or a refusal in the dialect's own shape.
"""

import copy
import random
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from appliance.core import Dialect

_PIXEL: Final = "iVBORw0KGgo="
_SCHEMA: Final = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 5}, "b": {"$ref": "#/$defs/c"}},
    "required": ["a"],
    "$defs": {"c": {"type": "array", "items": {"anyOf": [{"enum": [1, "x"]}, {"type": "null"}]}}},
}
_GEMINI_SCHEMA: Final = {
    "type": "OBJECT",
    "properties": {"a": {"type": "STRING", "nullable": True}, "b": {"type": "ARRAY", "items": {"type": "INTEGER"}}},
    "required": ["a"],
    "propertyOrdering": ["b", "a"],
}


class Sent(NamedTuple):
    dialect: Dialect
    path: str
    body: Any


_CHAT: Final[Mapping[str, Any]] = {
    "model": "auto",
    "messages": [
        {"role": "developer", "content": "x"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_PIXEL}", "detail": "low"}},
            ],
        },
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "x",
            "thinking_blocks": [{"type": "thinking", "thinking": "x", "signature": "x"}],
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "x"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "description": "x", "parameters": _SCHEMA}}],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}},
    "reasoning_effort": "low",
    "stream": True,
    "stream_options": {"include_usage": True},
    "stop": ["x"],
    "n": 1,
    "temperature": 1,
    "max_completion_tokens": 5,
    "logprobs": True,
    "top_logprobs": 1,
    "metadata": {"a": "b"},
    "user": "u",
    "store": False,
}
_MESSAGES: Final[Mapping[str, Any]] = {
    "model": "auto",
    "max_tokens": 2_000,
    "system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "5m"}}],
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "x"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": _PIXEL}},
                {"type": "document", "title": "x", "source": {"type": "text", "media_type": "text/plain", "data": "x"}},
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "x", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "x"},
                {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "1",
                    "is_error": True,
                    "content": [{"type": "text", "text": "x"}],
                },
                {"type": "text", "text": "x"},
            ],
        },
    ],
    "tools": [{"name": "f", "description": "x", "input_schema": _SCHEMA, "strict": False}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "output_config": {"effort": "low"},
    "stop_sequences": ["x"],
    "temperature": 1,
    "top_p": 0.5,
    "top_k": 5,
    "metadata": {"user_id": "u"},
    "service_tier": "auto",
    "stream": True,
}
_RESPONSES: Final[Mapping[str, Any]] = {
    "model": "auto",
    "instructions": "x",
    "input": [
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "x"},
                {"type": "input_image", "detail": "auto", "image_url": f"data:image/png;base64,{_PIXEL}"},
            ],
        },
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "x"}], "encrypted_content": None},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "x", "annotations": []}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "x"}]},
    ],
    "tools": [{"type": "function", "name": "f", "description": "x", "parameters": _SCHEMA, "strict": False}],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    "parallel_tool_calls": True,
    "text": {"format": {"type": "json_schema", "name": "x", "schema": _SCHEMA}},
    "reasoning": {"effort": "low", "summary": "auto"},
    "include": ["reasoning.encrypted_content", "message.output_text.logprobs"],
    "top_logprobs": 1,
    "max_output_tokens": 5,
    "temperature": 1,
    "truncation": "disabled",
    "metadata": {"a": "b"},
    "store": False,
    "stream": True,
}
_GEMINI: Final[Mapping[str, Any]] = {
    "contents": [
        {"role": "user", "parts": [{"text": "x"}, {"inlineData": {"mimeType": "image/png", "data": _PIXEL}}]},
        {
            "role": "model",
            "parts": [
                {"text": "x", "thought": True},
                {"functionCall": {"name": "f", "args": {"a": 1}}, "thoughtSignature": "AAAA"},
            ],
        },
        {"role": "user", "parts": [{"functionResponse": {"name": "f", "response": {"result": "x"}}}]},
    ],
    "systemInstruction": {"parts": [{"text": "x"}]},
    "tools": [{"functionDeclarations": [{"name": "f", "description": "x", "parameters": _GEMINI_SCHEMA}]}],
    "toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["f"]}},
    "safetySettings": [{"category": "HARM_CATEGORY_HARASSMENT", "threshold": "OFF"}],
    "generationConfig": {
        "responseMimeType": "application/json",
        "responseSchema": _GEMINI_SCHEMA,
        "stopSequences": ["x"],
        "candidateCount": 1,
        "maxOutputTokens": 5,
        "temperature": 1,
        "topP": 0.5,
        "topK": 5,
        "seed": 1,
        "responseLogprobs": True,
        "logprobs": 1,
        "thinkingConfig": {"includeThoughts": True, "thinkingBudget": 1024},
    },
}

GOOD: Final[tuple[Sent, ...]] = (
    Sent("openai", "/v1/chat/completions", _CHAT),
    Sent("openai", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "stream": True}),
    Sent("anthropic", "/v1/messages", _MESSAGES),
    Sent(
        "anthropic", "/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": "x"}], "stream": True}
    ),
    Sent("anthropic", "/v1/messages/count_tokens", {"messages": _MESSAGES["messages"], "tools": _MESSAGES["tools"]}),
    Sent("openai", "/v1/responses", _RESPONSES),
    Sent("openai", "/v1/responses", {"input": "x", "stream": True}),
    Sent("gemini", "/v1beta/models/auto:generateContent", _GEMINI),
    Sent("gemini", "/v1beta/models/auto:streamGenerateContent?alt=sse", {"contents": _GEMINI["contents"]}),
    Sent("gemini", "/v1beta/models/auto:countTokens", {"contents": _GEMINI["contents"]}),
)

_WORDS: Final = (
    "",
    "auto",
    "user",
    "text",
    "x",
    "none",
    "object",
    "\u0000",
    "ü",
    "#",
    "https://x",
    "data:,",
    "a" * 300,
)
_NUMBERS: Final = (0, 1, -1, 2, 7, 1024, 10**6, 2**63, -(2**63), 0.5, 1.0, -0.0, 1e300)


def mutations(seed: int, count: int) -> Iterator[Sent]:
    """`count` bodies, each a good one with one to three places changed; the same for the same seed."""
    chance = random.Random(seed)
    for _ in range(count):
        sent = chance.choice(GOOD)
        body = copy.deepcopy(dict(sent.body))
        for _ in range(chance.randint(1, 3)):
            _spoil(chance, body)
        yield sent._replace(body=body)


def _spoil(chance: random.Random, inside: Any) -> None:
    """Replace, remove, rename, double or move one value somewhere inside."""
    while True:
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        if not keys:
            return
        key = chance.choice(keys)
        if isinstance(inside[key], dict | list) and chance.random() < 0.75:
            inside = inside[key]
            continue
        break
    what = chance.choice(("replace", "replace", "remove", "double", "rename", "wrap"))
    if what == "remove":
        del inside[key]
    elif what == "wrap":
        inside[key] = chance.choice(([inside[key]], {"type": inside[key]}, {str(key): inside[key]}))
    elif what == "replace" or isinstance(inside, list):
        if what == "double":
            inside.append(copy.deepcopy(inside[key]))
        else:
            inside[key] = _anything(chance)
    else:
        value = inside.pop(key) if what == "rename" else copy.deepcopy(inside[key])
        inside[chance.choice((f"{key}s", str(key).upper(), _word(chance), "type", "content", "role"))] = value


def _anything(chance: random.Random, depth: int = 0) -> Any:
    kind = chance.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return _word(chance)
    if kind < 4:
        return chance.choice(_NUMBERS)
    if kind == 4:
        return chance.choice((None, True, False))
    if kind == 5:
        return [_anything(chance, depth + 1) for _ in range(chance.randint(0, 3))]
    names = ("type", "text", "content", "role", "name", "id", "function", "properties", "$ref", "parts", _word(chance))
    return {chance.choice(names): _anything(chance, depth + 1) for _ in range(chance.randint(0, 3))}


def _word(chance: random.Random) -> str:
    return chance.choice(_WORDS)


def is_in_shape(sent: Sent, status: int, body: Any) -> bool:
    """Whether a refusal with `status` and `body` is one as clients of that dialect know it."""
    if not isinstance(body, dict) or not isinstance(body.get("error"), dict) or not body["error"].get("message"):
        return False
    error = body["error"]
    if sent.dialect == "anthropic":
        return set(body) == {"type", "error", "request_id"} and set(error) == {"type", "message"}
    if sent.dialect == "gemini":
        return set(error) == {"code", "message", "status", "details"} and error["code"] == status
    return set(error) == {"message", "type", "param", "code"}
