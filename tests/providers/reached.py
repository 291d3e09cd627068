"""A stand-in as the appliance sees it: the row of a configuration, the target it makes, and the door to it."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from appliance.config import NodeConfig, list_provider_targets
from appliance.core import EgressPermit, Target, UpstreamCall, UpstreamReply
from appliance.upstream import client
from appliance.upstream.egress import EgressTransport
from appliance.upstream.permit_signature import sign_permit
from tests.providers.anthropic_api import AnthropicApi
from tests.providers.collected import Collected, collected
from tests.providers.gemini_api import GeminiApi
from tests.providers.openai_api import OpenaiApi
from tests.providers.served import Served
from tests.providers.speech import HELLO

Spoken = Literal["openai", "responses", "anthropic", "gemini"]
SPOKEN: tuple[Spoken, ...] = ("openai", "responses", "anthropic", "gemini")
KEY = b"k" * 32
ABILITIES = ("chat", "json_schema", "tools", "vision", "reasoning")


def api_of(spoken: Spoken) -> Served:
    return {"openai": OpenaiApi, "responses": OpenaiApi, "anthropic": AnthropicApi, "gemini": GeminiApi}[spoken](HELLO)


def row_of(spoken: Spoken, address: str, **fields: Any) -> dict[str, Any]:
    """A provider as the operator would write it."""
    kind = {"openai": "openai", "responses": "openai", "anthropic": "anthropic", "gemini": "gemini"}[spoken]
    names = {"name", "kind", "dialect", "base_url", "api_version", "headers", "location"}
    model = {
        "name": "big-model",
        "abilities": ABILITIES if spoken == "anthropic" else (*ABILITIES, "logprobs"),
        "input_usd": 2.0,
        "output_usd": 8.0,
        "api": "responses" if spoken == "responses" else "chat",
        **{name: value for name, value in fields.items() if name not in names},
    }
    row = {"name": "cloud", "kind": kind, "base_url": address, "models": [model]}
    return {**row, **{name: value for name, value in fields.items() if name in names}}


def target_of(row: Mapping[str, Any]) -> Target:
    config = NodeConfig.model_validate_json(orjson.dumps({"providers": [row]}))
    (target,) = list_provider_targets(config)
    return target


@dataclass
class Reached:
    api: Served
    target: Target
    door: EgressTransport

    @property
    def permit(self) -> EgressPermit:
        return EgressPermit("req-1", self.target.name, sign_permit(KEY, "req-1", self.target))

    async def send(self, body: Mapping[str, Any], path: str = "/chat/completions") -> UpstreamReply:
        letter = client.write_request(self.target, UpstreamCall(path, body), stream=False, salt="s")
        return await client.send_request(self.door, letter, permit=self.permit, seconds=10)

    async def stream(self, body: Mapping[str, Any]) -> tuple[Collected, client.ReplyStream]:
        """Everything that the stream had to say. Raises StreamBroken as it comes."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        letter = client.write_request(self.target, UpstreamCall("/chat/completions", body), stream=True, salt="s")
        opened = await client.open_stream(self.door, letter, permit=self.permit, seconds=10)
        blocks = []
        try:
            while block := await opened.next_block():
                blocks.append(block)
        finally:
            await opened.aclose()
        return collected(b"".join(blocks)), opened


@asynccontextmanager
async def reached(spoken: Spoken, **fields: Any) -> AsyncIterator[Reached]:
    """A stand-in that is up, and everything that is needed to talk to it."""
    async with api_of(spoken) as api:
        target = target_of(row_of(spoken, api.address, **fields))
        door = EgressTransport({"cloud": target.address}, {"cloud": "sk-secret"}, KEY)
        try:
            yield Reached(api, target, door)
        finally:
            await door.aclose()
