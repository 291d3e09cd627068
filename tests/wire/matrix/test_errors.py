"""How a provider or an engine fails, and what clients of each API get: the documentation's table, as it happens."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.providers.reached import SPOKEN, Spoken, api_of, row_of, target_of
from tests.providers.speech import Fail
from tests.wire.matrix.clients import INBOUND, Inbound
from tests.wire.matrix.stages import node_over

pytestmark = pytest.mark.anyio

PAGE = Path(__file__).resolve().parents[3] / "appliance" / "docs" / "errors.md"
BEGIN, END = "<!-- upstream errors: tests/wire/matrix/test_errors.py compares -->", "<!-- upstream errors: end -->"
FAILURES: dict[str, Fail | None] = {
    "400, 404, 422: the request is wrong": Fail(400, "invalid_request_error"),
    "400: the prompt is too long": Fail(
        400, "context_length_exceeded", "prompt is too long: 210000 tokens > 200000 maximum"
    ),
    "401, 403: our key": Fail(401, "authentication_error"),
    "408, 504: too slow": Fail(504, "timeout_error"),
    "429: its limit is reached": Fail(429, "rate_limit_error", headers={"retry-after": "7"}),
    "500, 502: its own mistake": Fail(500, "api_error"),
    "503, 529: overloaded": Fail(529, "overloaded_error"),
    "cannot be reached": None,
}
ASKED: dict[Inbound, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    "responses": ("/v1/responses", {"input": "x"}),
    "messages": ("/v1/messages", {"max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}),
    "gemini": ("/v1beta/models/auto:generateContent", {"contents": [{"parts": [{"text": "x"}]}]}),
}


async def told(outbound: Spoken, fail: Fail | None) -> dict[Inbound, httpx.Response]:
    """What callers of every API get where a provider of one dialect fails so."""
    answers = {}
    for inbound in INBOUND:
        async with api_of(outbound) as api:
            address = api.address if fail is not None else "http://127.0.0.1:9/v1beta"
            api.says = fail or api.says
            if fail is not None and fail.kind == "context_length_exceeded" and outbound == "anthropic":
                api.says = Fail(fail.status, "invalid_request_error", fail.message)
            path, body = ASKED[inbound]
            async with (
                node_over(target_of(row_of(outbound, address))) as (url, _),
                httpx.AsyncClient(base_url=url) as client,
            ):
                answers[inbound] = await client.post(path, json=body)
    return answers


def row(what: str, answers: dict[Inbound, httpx.Response]) -> str:
    chat, messages, gemini = answers["chat"], answers["messages"], answers["gemini"]
    error = chat.json()["error"]
    # OpenAI's dialect alone has codes of its own, which are passed on.
    code = "upstream_rejected" if error["code"] == "invalid_request_error" else error["code"]
    anthropic = f"{messages.status_code} `{messages.json()['error']['type']}`"
    google = f"{gemini.status_code} `{gemini.json()['error']['status']}`"
    return f"| {what} | `{code}` | {chat.status_code} `{error['type']}` | {anthropic} | {google} |"


@pytest.mark.parametrize("outbound", SPOKEN)
@pytest.mark.parametrize("what", FAILURES)
async def test_a_providers_error_becomes_what_the_documentation_says(what: str, outbound: Spoken) -> None:
    fail = FAILURES[what]
    answers = await told(outbound, fail)
    table = PAGE.read_text("utf-8").partition(BEGIN)[2].partition(END)[0]
    assert row(what, answers) in table.splitlines()
    assert answers["responses"].json()["error"]["code"] == answers["chat"].json()["error"]["code"]
    for answer in answers.values():
        assert answer.headers["x-request-id"] and "sk-secret" not in answer.text
        if fail is not None and fail.headers:
            assert int(answer.headers["retry-after"]) >= 1
