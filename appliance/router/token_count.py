"""Counting a prompt's tokens without having it answered: by the tokenizer of the engine that would answer it.

Where that engine cannot be asked, the estimate is told that routing goes by, corrected by what the target's own counts
have taught. Nothing leaves the site for a count, and none is written down.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import orjson

from appliance.core import Decision, Target
from appliance.core.json_types import JsonObject
from appliance.errors import ApplianceError
from appliance.upstream.base import Transport, close_response

SECONDS: Final = 5.0
"""A tokenizer needs milliseconds; an engine that does not say so soon is not waited for."""

_MAX_REPLY_BYTES: Final = 16_000_000


@dataclass(frozen=True, slots=True)
class TokenCount:
    tokens: int
    decision: Decision
    target: str | None
    """Whose count it is, or whose it is an estimate of; None where nobody would answer."""
    method: Literal["tokenizer", "estimate"]

    def headers(self) -> Mapping[str, str]:
        return {
            "x-appliance-target": self.target or "none",
            "x-appliance-route": self.decision.route.name,
            "x-appliance-count": self.method,
        }


async def count_prompt_tokens(transport: Transport, target: Target, chat: JsonObject) -> int | None:
    """The engine's own count of a chat; None where it does not tell. Only engines of this node are asked."""
    if target.provider is not None:
        return None
    asked = {name: chat[name] for name in ("messages", "tools") if chat.get(name)}
    with contextlib.suppress(ApplianceError, TimeoutError):
        async with asyncio.timeout(SECONDS):
            body = orjson.dumps({"model": target.model, **asked})
            response = await transport.open(target, "/tokenize", body, permit=None, at_root=True)
            try:
                raw = b""
                async for part in response.aiter_bytes():
                    raw += part
                    if len(raw) > _MAX_REPLY_BYTES:
                        return None
            finally:
                await close_response(response)
            return _count(raw) if response.status_code == 200 else None
    return None


def _count(raw: bytes) -> int | None:
    try:
        reply = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    count = reply.get("count") if isinstance(reply, dict) else None
    return count if type(count) is int and count >= 0 else None
