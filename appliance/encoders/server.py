"""HTTP on one unix socket: the router is the only caller."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from appliance.encoders.json_log import log
from appliance.encoders.service import EncoderService
from appliance.errors import ApplianceError, BodyTooLarge, ClientGone, NotFound, RequestError, Unavailable

MAX_BODY_BYTES = 64_000_000
_MOST_DIGITS = 10
_OWN_MISTAKE = ApplianceError("the encoder program made a mistake of its own; its log says which")


class EncoderEndpoints:
    def __init__(self, desk: EncoderService) -> None:
        self.desk = desk
        self.is_draining = False

    async def health(self, request: Request) -> Response:
        return _json({"status": "draining"}, 503) if self.is_draining else _json({"status": "ok"})

    async def load(self, request: Request) -> Response:
        return _json(self.desk.load())

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": self.desk.models()})

    async def served(self, request: Request) -> Response:
        """What the router may send here, by name."""
        return _json(await asyncio.to_thread(self.desk.served))

    async def embeddings(self, request: Request) -> Response:
        return await self._work(request, self.desk.embed)

    async def classify(self, request: Request) -> Response:
        return await self._work(request, self.desk.classify)

    async def _work(self, request: Request, work: Callable[[Mapping[str, Any]], Awaitable[bytes]]) -> Response:
        if self.is_draining:
            raise Unavailable("the encoder program is stopping; try again", retry_after_seconds=2)
        body = await _body(request)
        with self.desk.at_work():
            return _raw(await work(body))

    async def train(self, request: Request) -> Response:
        run = await self.desk.train(await _body(request))
        return _json(run.facts(), 202)

    async def classifiers(self, request: Request) -> Response:
        rows = await asyncio.to_thread(self.desk.list)
        running = self.desk.runs.running
        return _json({"object": "list", "data": rows, "training": running and running.facts()})

    async def show(self, request: Request) -> Response:
        return _json(await asyncio.to_thread(self.desk.show, request.path_params["name"], _version(request)))

    async def evaluate(self, request: Request) -> Response:
        return _json(await self.desk.evaluate(request.path_params["name"], await _body(request)))

    async def roll_back(self, request: Request) -> Response:
        body = await _body(request)
        return _json(self.desk.roll_back(request.path_params["name"], body.get("version")))

    async def threshold(self, request: Request) -> Response:
        return _json(await self.desk.threshold(request.path_params["name"], await _body(request)))

    async def shadow(self, request: Request) -> Response:
        return _json(await self.desk.shadow(request.path_params["name"], (await _body(request)).get("version")))

    async def remove(self, request: Request) -> Response:
        version = _version(request)
        if version is not None:
            return _json(await asyncio.to_thread(self.desk.remove_version, request.path_params["name"], version))
        return _json(await asyncio.to_thread(self.desk.remove, request.path_params["name"]))

    async def training(self, request: Request) -> Response:
        return _json(self.desk.runs.get(request.path_params["name"]).facts())

    async def cancel(self, request: Request) -> Response:
        return _json(self.desk.runs.cancel(request.path_params["name"]).facts())


def make_app(endpoints: EncoderEndpoints) -> Starlette:
    one = "/v1/classifiers/{name}"
    return Starlette(
        routes=[
            Route("/health", endpoints.health, methods=["GET"]),
            Route("/load", endpoints.load, methods=["GET"]),
            Route("/v1/served", endpoints.served, methods=["GET"]),
            Route("/v1/models", endpoints.models, methods=["GET"]),
            Route("/v1/embeddings", endpoints.embeddings, methods=["POST"]),
            Route("/v1/classify", endpoints.classify, methods=["POST"]),
            Route("/v1/classifiers", endpoints.train, methods=["POST"]),
            Route("/v1/classifiers", endpoints.classifiers, methods=["GET"]),
            Route(one, endpoints.show, methods=["GET"]),
            Route(one, endpoints.remove, methods=["DELETE"]),
            Route(f"{one}/evaluate", endpoints.evaluate, methods=["POST"]),
            Route(f"{one}/rollback", endpoints.roll_back, methods=["POST"]),
            Route(f"{one}/threshold", endpoints.threshold, methods=["POST"]),
            Route(f"{one}/shadow", endpoints.shadow, methods=["POST"]),
            Route(f"{one}/training", endpoints.training, methods=["GET"]),
            Route(f"{one}/training", endpoints.cancel, methods=["DELETE"]),
        ],
        exception_handlers={ApplianceError: _on_error, HTTPException: _on_http_error, Exception: _on_bug},
    )


def _version(request: Request) -> int | None:
    text = request.query_params.get("version")
    if text is not None and not (text.isascii() and text.isdigit() and len(text) < _MOST_DIGITS):
        raise RequestError(f"version is {text[:40]!r}: it must be a whole number from 1", param="version")
    return None if text is None else int(text)


async def _body(request: Request) -> Mapping[str, Any]:
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > MAX_BODY_BYTES:
                raise BodyTooLarge(f"the body has more than {MAX_BODY_BYTES} bytes: send less in one call")
            chunks.append(chunk)
    except ClientDisconnect:
        raise ClientGone("the client left while it was sending") from None
    raw = b"".join(chunks)
    try:
        value = orjson.loads(raw) if raw else {}
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    return value


def _json(value: Any, status: int = 200) -> Response:
    return _raw(orjson.dumps(value), status)


def _raw(body: bytes, status: int = 200) -> Response:
    return Response(body, status, media_type="application/json")


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApplianceError)
    if error.status >= 500:
        log("request_failed", path=request.url.path, code=error.code, reason=error.message)
    response = _json(error.to_openai(), error.status)
    if error.retry_after_seconds is not None:
        response.headers["retry-after"] = str(max(1, math.ceil(error.retry_after_seconds)))
    return response


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    missing = NotFound(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
    return _json(missing.to_openai(), missing.status)


async def _on_bug(request: Request, error: Exception) -> Response:
    log("bug", path=request.url.path, reason=f"{type(error).__name__}: {error}")
    return _json(_OWN_MISTAKE.to_openai(), 500)
