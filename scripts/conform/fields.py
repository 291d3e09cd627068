"""Every optional field of the SDKs' own tests by itself: it is taken, or refused by its name, and nothing else."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from scripts.conform.outcomes import Outcome

SUITE: Final = "fields"
_HELLO: Final = [{"role": "user", "content": "Say hi"}]
_ALL: Final = "test_method_create_with_all_params_overload_1"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a body with every field stands, and the least that its endpoint wants."""

    sdk: str
    file: str
    test: str
    path: str
    least: Mapping[str, Any]


PLACES: Final = (
    Place("openai", "chat/test_completions.py", _ALL, "/v1/chat/completions", {"messages": _HELLO, "max_tokens": 4}),
    Place("openai", "test_completions.py", _ALL, "/v1/completions", {"prompt": "Hi", "max_tokens": 4}),
    Place("openai", "test_responses.py", _ALL, "/v1/responses", {"input": "Say hi", "max_output_tokens": 16}),
    Place(
        "openai",
        "responses/test_input_tokens.py",
        "test_method_count_with_all_params",
        "/v1/responses/input_tokens",
        {"input": "Say hi"},
    ),
    Place("anthropic", "test_messages.py", _ALL, "/v1/messages", {"messages": _HELLO, "max_tokens": 1500}),
    Place(
        "anthropic",
        "test_messages.py",
        "test_method_count_tokens_with_all_params",
        "/v1/messages/count_tokens",
        {"messages": _HELLO},
    ),
)
_WITH: Final[Mapping[str, Mapping[str, Any]]] = {
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True},
}
"""Fields that mean something beside others alone."""


def outcomes(url: str, sources: Mapping[str, Path]) -> Iterator[Outcome]:
    with httpx.Client(base_url=url, timeout=120) as client:
        for place in PLACES:
            file = sources[place.sdk] / "tests" / "api_resources" / place.file
            for name, value in body_of(file, place.test).items():
                yield _asked(client, place, name, value)


def _asked(client: httpx.Client, place: Place, name: str, value: Any) -> Outcome:
    beside = {} if place.path == "/v1/responses" else _WITH.get(name, {})
    test = f"{place.path} {name}"
    try:
        answer = client.post(place.path, json={"model": "gpt-6", **place.least, **beside, name: value})
    except httpx.HTTPError as error:
        return Outcome(SUITE, test, "failed", f"no answer: {error!r}")
    if answer.status_code == 200:
        return Outcome(SUITE, test, "passed")
    said = answer.json()["error"]["message"] if answer.headers["content-type"] == "application/json" else answer.text
    if answer.status_code != 400:
        return Outcome(SUITE, test, "failed", f"HTTP {answer.status_code}: {said[:200]}", said)
    names = {name, name.rstrip("s"), *(value if isinstance(value, dict) else ())}
    if any(one in said for one in names) or "cannot do tools" in said or "cannot do reasoning" in said:
        return Outcome(SUITE, test, "not applicable", f"refused by name: {said[:110]}", said)
    return Outcome(SUITE, test, "failed", f"refused, but not by its name: {said[:200]}", said)


def body_of(file: Path, test: str) -> dict[str, Any]:
    """The keyword arguments that the first call of an API has in a test."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == test:
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and call.keywords:
                    return {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    raise LookupError(f"{file} has no {test}")
