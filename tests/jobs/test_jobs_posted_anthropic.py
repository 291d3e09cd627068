"""Lines in Anthropic's Message Batches, checked against the official SDK's types."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from anthropic.types.messages import MessageBatch, MessageBatchIndividualResponse
from anthropic.types.messages.batch_create_params import BatchCreateParams
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from tests.jobs.office import ended, rows
from tests.jobs.posted import PostOffice, chat
from tests.providers.anthropic_api import AnthropicApi, message_of
from tests.providers.served import typed_wrongs
from tests.providers.speech import Say

pytestmark = pytest.mark.anyio

CREATE: TypeAdapter[Any] = TypeAdapter(BatchCreateParams)


class AnthropicBatchesApi(AnthropicApi):
    """Does a batch as soon as it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.results = b""

    async def _answer(self, request: Request) -> Response:
        path, raw = request.url.path.removeprefix(self.version), await request.body()
        self.paths.append(f"{request.method} {path}")
        if request.headers.get("x-api-key") != "sk-secret" or not request.headers.get("anthropic-version"):
            self.wrongs.append("no key or version")
        if path.endswith("/results"):
            return Response(self.results)
        if request.method == "POST":
            body = orjson.loads(raw)
            self.wrongs += typed_wrongs(CREATE, body)
            self.results = b"".join(self._row(one) for one in body["requests"])
        counts = {"canceled": 0, "errored": 0, "expired": 0, "processing": 0, "succeeded": 5}
        made = {
            "id": "msgbatch_1", "type": "message_batch", "processing_status": "ended", "request_counts": counts,
            "created_at": "2026-11-20T09:00:00Z", "expires_at": "2026-11-21T09:00:00Z",
        }  # fmt: skip
        return Response(MessageBatch.model_validate(made).to_json(), media_type="application/json")

    def _row(self, one: dict[str, Any]) -> bytes:
        params, name = one["params"], one["custom_id"]
        said = Say("fine", prompt_tokens=1000, output_tokens=500)
        result = {"type": "succeeded", "message": message_of(params, said).to_dict()}
        row = MessageBatchIndividualResponse.model_validate({"custom_id": name, "result": result})
        return orjson.dumps(row.to_dict(mode="json"), option=orjson.OPT_APPEND_NEWLINE)


@pytest.fixture
async def provider() -> AsyncIterator[AnthropicBatchesApi]:
    async with AnthropicBatchesApi() as made:
        yield made


async def test_lines_leave_in_a_message_batch_and_come_back_as_chat_completions(
    tmp_path: Path, provider: AnthropicBatchesApi
) -> None:
    office = PostOffice(tmp_path, provider.address, kind="anthropic")
    async with office.desk() as desk:
        batch = await ended(desk, await office.batch(desk, [chat(n) for n in range(1, 6)]))
        found = rows(desk, batch.output_file_id)
    assert provider.wrongs == []
    assert [row["response"]["body"]["choices"][0]["message"]["content"] for row in found] == ["fine"] * 5
    assert batch.cost_usd == pytest.approx(5 * (1000 * 2.0 + 500 * 8.0) / 1e6 / 2)
    assert provider.paths == [
        "POST /messages/batches", "GET /messages/batches/msgbatch_1", "GET /messages/batches/msgbatch_1/results",
        "DELETE /messages/batches/msgbatch_1",
    ]  # fmt: skip
