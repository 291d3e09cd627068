"""HTTP on one unix socket: the router is the only caller."""

import asyncio
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from appliance.core.json_types import JsonObject
from appliance.encoders.service import EncoderService
from appliance.errors import RequestError, Unavailable
from appliance.worker.body_limits import parse_json_object, read_body
from appliance.worker.responses import EXCEPTION_HANDLERS, json_response, raw_json_response

MAX_BODY_BYTES = 64_000_000
_MOST_DIGITS = 10


class EncoderEndpoints:
    def __init__(self, service: EncoderService) -> None:
        self.service = service
        self.is_draining = False

    async def health(self, request: Request) -> Response:
        return json_response({"status": "draining"}, 503) if self.is_draining else json_response({"status": "ok"})

    async def load(self, request: Request) -> Response:
        return json_response(self.service.report_load())

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": self.service.list_models()})

    async def served(self, request: Request) -> Response:
        """What the router may send here, by name."""
        served = await asyncio.to_thread(self.service.list_served)
        self.service.measure_speed_once()
        return json_response(served)

    async def embeddings(self, request: Request) -> Response:
        return await self._work(request, self.service.embed)

    async def classify(self, request: Request) -> Response:
        return await self._work(request, self.service.classify)

    async def _work(self, request: Request, work: Callable[[JsonObject], Awaitable[bytes]]) -> Response:
        if self.is_draining:
            raise Unavailable("the encoder program is stopping; try again", retry_after_seconds=2)
        body = await _body(request)
        with self.service.requests.track():
            return raw_json_response(await work(body))

    async def train(self, request: Request) -> Response:
        run = await self.service.train(await _body(request))
        return json_response(run.to_json(), 202)

    async def classifiers(self, request: Request) -> Response:
        rows = await asyncio.to_thread(self.service.list)
        running = self.service.training_jobs.running
        return json_response({"object": "list", "data": rows, "training": running and running.to_json()})

    async def show(self, request: Request) -> Response:
        return json_response(await asyncio.to_thread(self.service.show, request.path_params["name"], _version(request)))

    async def evaluate(self, request: Request) -> Response:
        return json_response(await self.service.evaluate(request.path_params["name"], await _body(request)))

    async def roll_back(self, request: Request) -> Response:
        body = await _body(request)
        return json_response(self.service.roll_back(request.path_params["name"], body.get("version")))

    async def threshold(self, request: Request) -> Response:
        return json_response(await self.service.threshold(request.path_params["name"], await _body(request)))

    async def shadow(self, request: Request) -> Response:
        return json_response(
            await self.service.shadow(request.path_params["name"], (await _body(request)).get("version"))
        )

    async def remove(self, request: Request) -> Response:
        version = _version(request)
        if version is not None:
            return json_response(
                await asyncio.to_thread(self.service.remove_version, request.path_params["name"], version)
            )
        return json_response(await asyncio.to_thread(self.service.remove, request.path_params["name"]))

    async def training(self, request: Request) -> Response:
        return json_response(self.service.training_jobs.get(request.path_params["name"]).to_json())

    async def cancel(self, request: Request) -> Response:
        return json_response(self.service.training_jobs.cancel(request.path_params["name"]).to_json())


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
        exception_handlers=EXCEPTION_HANDLERS,
    )


def _version(request: Request) -> int | None:
    text = request.query_params.get("version")
    if text is not None and not (text.isascii() and text.isdigit() and len(text) < _MOST_DIGITS):
        raise RequestError(f"version is {text[:40]!r}: it must be a whole number from 1", param="version")
    return None if text is None else int(text)


async def _body(request: Request) -> JsonObject:
    return parse_json_object(await read_body(request, MAX_BODY_BYTES))
