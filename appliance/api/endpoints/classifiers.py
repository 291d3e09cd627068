"""Classifiers over HTTP: train, list, show, evaluate, roll back, remove. What they answer goes through /v1/decisions.

`POST /v1/classifiers` takes {name, examples, format, labels, accuracy, tier, encoder}: `examples` a list of
{text, label}, or a JSONL or CSV file as text (`format`); `accuracy` what is wanted on held-out rows; `tier` the dearest
features that may be used (`words` or `encoder`). It answers 202 with the training, whose progress is at
`GET /v1/classifiers/NAME/training`, or as server-sent events with `?stream=true`. Changes take the scope admin.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Final
from urllib.parse import quote

import orjson
from starlette.requests import Request as Http
from starlette.responses import Response, StreamingResponse

from appliance.api.body import read_body
from appliance.api.endpoints.feedback import FeedbackStore
from appliance.api.intake import RequestIntake
from appliance.api.json_responses import respond_json
from appliance.errors import NotFound, Unavailable
from appliance.quality.candidates import EncoderClient, EncoderReply
from appliance.wire.json_body import parse_body

_PATH: Final = "/v1/classifiers"
_PROGRESS_SECONDS: Final = 0.5


class ClassifierEndpoints:
    """`encoders` is None in programs without a control plane: then every call says so. `learning` None: what is shown
    is of trainings alone."""

    def __init__(
        self,
        intake: RequestIntake,
        encoders: EncoderClient | None,
        max_body_bytes: int,
        learning: FeedbackStore | None = None,
    ) -> None:
        self._intake, self._encoders, self._max_body_bytes = intake, encoders, max_body_bytes
        self._learning = learning

    async def train_classifier(self, http: Http) -> Response:
        return await self._forward_change(http, "POST", _PATH)

    async def list_classifiers(self, http: Http) -> Response:
        return await self._forward_read(http, _PATH)

    async def get_classifier(self, http: Http) -> Response:
        query = f"?version={quote(http.query_params['version'])}" if "version" in http.query_params else ""
        shown = await self._forward_read(http, _path(http) + query)
        traffic = None if self._learning is None else await self._learning.describe_classifier(http.path_params["name"])
        if shown.status_code != 200 or traffic is None:
            return shown
        return respond_json({**orjson.loads(shown.body), "traffic": traffic})

    async def start_learning(self, http: Http) -> Response:
        """Train a candidate on what traffic has taught so far."""
        self._intake.auth.authenticate(http.headers, "admin")
        if self._learning is None:
            raise Unavailable("this program keeps no labels: ask a node that `appliance serve` runs, and see /healthz")
        return respond_json(await self._learning.start_training(http.path_params["name"]), status=202)

    async def evaluate_classifier(self, http: Http) -> Response:
        return await self._forward_change(http, "POST", f"{_path(http)}/evaluate")

    async def roll_back_classifier(self, http: Http) -> Response:
        return await self._forward_change(http, "POST", f"{_path(http)}/rollback")

    async def delete_classifier(self, http: Http) -> Response:
        """All versions with what was learned for them; with `?version=N` that one alone, which must not serve."""
        version = http.query_params.get("version")
        if version is not None:
            return await self._forward_change(http, "DELETE", f"{_path(http)}?version={quote(version)}")
        gone = await self._forward_change(http, "DELETE", _path(http))
        if gone.status_code == 200 and self._learning is not None:
            await self._learning.forget_classifier(http.path_params["name"])
        return gone

    async def get_training(self, http: Http) -> Response:
        path = f"{_path(http)}/training"
        if http.query_params.get("stream") != "true":
            return await self._forward_read(http, path)
        self._intake.auth.authenticate(http.headers)
        first = await self._ask("GET", path)
        if first.status != 200:
            return _response(first)
        return StreamingResponse(self._progress(path, first), media_type="text/event-stream")

    async def cancel_training(self, http: Http) -> Response:
        return await self._forward_change(http, "DELETE", f"{_path(http)}/training")

    async def _progress(self, path: str, reply: EncoderReply) -> AsyncIterator[bytes]:
        """An event for each change, the last one when the training has ended."""
        sent = b""
        while True:
            if reply.body != sent:
                sent = reply.body
                yield b"data: " + sent + b"\n\n"
            if reply.status != 200 or orjson.loads(reply.body)["state"] != "running":
                yield b"data: [DONE]\n\n"
                return
            await asyncio.sleep(_PROGRESS_SECONDS)
            reply = await self._ask("GET", path)

    async def _forward_read(self, http: Http, path: str) -> Response:
        self._intake.auth.authenticate(http.headers)
        return _response(await self._ask("GET", path))

    async def _forward_change(self, http: Http, method: str, path: str) -> Response:
        self._intake.auth.authenticate(http.headers, "admin")
        raw = b""
        if method == "POST":
            raw = await read_body(http.receive, http.headers, self._max_body_bytes)
            if raw.strip():
                await asyncio.to_thread(parse_body, raw)
        return _response(await self._ask(method, path, raw))

    async def _ask(self, method: str, path: str, body: bytes = b"") -> EncoderReply:
        if self._encoders is None:
            raise Unavailable("this program keeps no classifiers: ask a node that `appliance serve` runs")
        return await self._encoders.ask(method, path, body)


def _path(http: Http) -> str:
    """Of one classifier. Names of dots alone would lead to another place."""
    name: str = http.path_params["name"]
    if not name.strip("."):
        raise NotFound(f"there is no classifier {name!r}: GET {_PATH} lists them")
    return f"{_PATH}/{quote(name, safe='')}"


def _response(reply: EncoderReply) -> Response:
    headers = {} if reply.retry_after is None else {"retry-after": reply.retry_after}
    return Response(reply.body, reply.status, headers=headers, media_type="application/json")
