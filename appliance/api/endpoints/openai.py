"""OpenAI's own endpoints: chat completions, completions, embeddings, models."""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request as Http
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.api.intake import InboundRequest, RequestIntake
from appliance.api.json_responses import json_response
from appliance.api.model_list import AUTO, described, found
from appliance.api.relay import StreamResponse, as_stream
from appliance.core import Target
from appliance.errors import ApplianceError, Unsupported
from appliance.router.protocols import PipelineAnswer
from appliance.tasks import chat, completions, embeddings
from appliance.tasks.chat import ChatCall
from appliance.tasks.completions import CompletionCall
from appliance.wire.openai.stream import write_chat_stream

_NO_EMBEDDINGS = (
    "no model of this node does: the CPU engine serves chat models, so configure a provider (an on-site server counts) "
    'with a model that has abilities = ["embeddings"]'
)


class OpenAIEndpoints:
    def __init__(self, rim: RequestIntake) -> None:
        self._rim = rim
        self._started_at = int(rim.wall_clock())

    @property
    def _auto(self) -> Mapping[str, Any]:
        return {"id": AUTO, "object": "model", "created": self._started_at, "owned_by": "appliance"}

    async def chat(self, http: Http) -> ASGIApp:
        opened = await self._rim.open(http, chat.read_chat_request)
        return await self._answered(http, opened)

    async def completions(self, http: Http) -> ASGIApp:
        opened = await self._rim.open(http, completions.read_completion_request)
        return await self._answered(http, opened)

    async def embeddings(self, http: Http) -> ASGIApp:
        opened = await self._rim.open(http, embeddings.read_embedding_request)
        try:
            answer = await self._rim.answer(http, opened)
        except Unsupported as error:
            able = [
                one.name
                for one in self._rim.pipeline.list_models(opened.request.caller)
                if "embeddings" in one.abilities
            ]
            serve = f"these do: {', '.join(able)}" if able else _NO_EMBEDDINGS
            error.message = f"{opened.request.model!r} makes no embeddings; {serve}"
            raise
        return await whole(answer, answer.payload)

    async def _answered(self, http: Http, opened: InboundRequest[ChatCall] | InboundRequest[CompletionCall]) -> ASGIApp:
        answer = await self._rim.answer(http, opened)
        if answer.stream is not None:
            return StreamResponse(answer, answer.stream)
        if opened.request.stream:
            # It had to be verified whole first, so the stream is made of the verified reply.
            return StreamResponse(answer, as_stream(write_chat_stream(answer.payload, opened.request.body)))
        return await whole(answer, answer.payload)

    async def models(self, http: Http) -> Response:
        caller = self._rim.auth.caller(http.headers)
        return json_response({"object": "list", "data": self._models(self._rim.pipeline.list_models(caller))})

    async def model(self, http: Http) -> Response:
        caller = self._rim.auth.caller(http.headers)
        name = http.path_params["name"]
        target = found(self._rim.pipeline, caller, name)
        return json_response({**(self._auto if target is None else self._model(target)), "id": name})

    def _models(self, targets: Sequence[Target]) -> Sequence[Mapping[str, Any]]:
        return [self._auto, *(self._model(target) for target in targets)]

    def _model(self, target: Target) -> Mapping[str, Any]:
        """OpenAI's fields, and what the appliance knows of the target besides. `created` is when this node started."""
        return {
            "id": target.name,
            "object": "model",
            "created": self._started_at,
            "owned_by": target.provider or "onsite",
            **described(target),
        }


async def whole(answer: PipelineAnswer, payload: Any) -> Response:
    """A whole answer as a response, and the answer closed."""
    headers = answer.metadata.headers()
    try:
        return json_response(payload, status=answer.status, headers=headers)
    except ApplianceError as error:
        error.headers = headers
        raise
    finally:
        await answer.aclose()
