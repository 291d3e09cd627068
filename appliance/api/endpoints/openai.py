"""OpenAI's own endpoints: chat completions, completions, embeddings, models, responses."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from starlette.requests import Request as Http
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.api.dialect_response import respond_in_dialect
from appliance.api.intake import InboundRequest, RequestIntake
from appliance.api.json_responses import respond_json, respond_whole
from appliance.api.model_list import AUTO, describe_target, find_model
from appliance.api.relay import StreamResponse, stream_pieces
from appliance.core import Target
from appliance.errors import Unsupported
from appliance.tasks import chat, completions, embeddings
from appliance.tasks.chat import ChatCall, read_translated_chat, read_translated_count
from appliance.tasks.completions import CompletionCall
from appliance.wire.openai.stream import write_chat_stream
from appliance.wire.registry import INBOUND

_RESPONSES: Final = INBOUND["responses"]
_NO_EMBEDDINGS = (
    "no model of this node does: the CPU engine serves chat models, so configure a provider (an on-site server counts) "
    'with a model that has abilities = ["embeddings"]'
)


class OpenAIEndpoints:
    def __init__(self, intake: RequestIntake) -> None:
        self._intake = intake
        self._started_at = int(intake.wall_clock())

    @property
    def _auto(self) -> Mapping[str, Any]:
        return {"id": AUTO, "object": "model", "created": self._started_at, "owned_by": "appliance"}

    async def create_chat_completion(self, http: Http) -> ASGIApp:
        inbound = await self._intake.read_request(http, chat.read_chat_request)
        return await self._answered(http, inbound)

    async def create_completion(self, http: Http) -> ASGIApp:
        inbound = await self._intake.read_request(http, completions.read_completion_request)
        return await self._answered(http, inbound)

    async def create_embeddings(self, http: Http) -> ASGIApp:
        inbound = await self._intake.read_request(http, embeddings.read_embedding_request)
        try:
            answer = await self._intake.answer(http, inbound)
        except Unsupported as error:
            able = [
                one.name
                for one in self._intake.pipeline.list_models(inbound.request.caller)
                if "embeddings" in one.abilities
            ]
            serve = f"these do: {', '.join(able)}" if able else _NO_EMBEDDINGS
            error.message = f"{inbound.request.model!r} makes no embeddings; {serve}"
            raise
        return await respond_whole(answer)

    async def _answered(
        self, http: Http, inbound: InboundRequest[ChatCall] | InboundRequest[CompletionCall]
    ) -> ASGIApp:
        answer = await self._intake.answer(http, inbound)
        if answer.stream is not None:
            return StreamResponse(answer, answer.stream)
        if inbound.request.stream:
            # It had to be verified whole first, so the stream is made of the verified reply.
            return StreamResponse(answer, stream_pieces(write_chat_stream(answer.payload, inbound.request.body)))
        return await respond_whole(answer)

    async def list_models(self, http: Http) -> Response:
        caller = self._intake.auth.authenticate(http.headers)
        return respond_json({"object": "list", "data": self._models(self._intake.pipeline.list_models(caller))})

    async def get_model(self, http: Http) -> Response:
        caller = self._intake.auth.authenticate(http.headers)
        name = http.path_params["name"]
        target = find_model(self._intake.pipeline, caller, name)
        return respond_json({**(self._auto if target is None else self._model(target)), "id": name})

    def _models(self, targets: Sequence[Target]) -> Sequence[Mapping[str, Any]]:
        return [self._auto, *(self._model(target) for target in targets)]

    def _model(self, target: Target) -> Mapping[str, Any]:
        """OpenAI's fields, and what the appliance knows of the target besides. `created` is when this node started."""
        return {
            "id": target.name,
            "object": "model",
            "created": self._started_at,
            "owned_by": target.provider or "onsite",
            **describe_target(target),
        }


class ResponsesEndpoints:
    """OpenAI's Responses. Nothing is kept: each request brings its whole conversation."""

    def __init__(self, intake: RequestIntake) -> None:
        self._intake = intake

    async def create_response(self, http: Http) -> ASGIApp:
        inbound = await self._intake.read_request(http, partial(read_translated_chat, _RESPONSES))
        answer = await self._intake.answer(http, inbound)
        return await respond_in_dialect(answer, inbound, _RESPONSES)

    async def count_tokens(self, http: Http) -> Response:
        inbound = await self._intake.read_request(http, partial(read_translated_count, _RESPONSES))
        counted = await self._intake.count_tokens(http, inbound)
        payload = {"object": "response.input_tokens", "input_tokens": counted.tokens}
        return respond_json(payload, headers=counted.headers())
