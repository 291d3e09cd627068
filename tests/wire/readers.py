"""Bodies of each dialect as requests, read as their endpoints read them."""

from collections.abc import Mapping, Sequence
from typing import Any

from appliance.core import ParsedRequest
from appliance.tasks.chat import ChatCall, read_translated_chat
from appliance.wire.anthropic.inbound import read_anthropic_chat
from appliance.wire.gemini.inbound import read_gemini_chat
from appliance.wire.responses.inbound import read_responses_chat

Parsed = tuple[ParsedRequest, Sequence[ChatCall]]


def read_messages(body: Mapping[str, Any]) -> Parsed:
    return read_translated_chat("messages", body, read_anthropic_chat(body))


def read_responses(body: Mapping[str, Any]) -> Parsed:
    return read_translated_chat("responses", body, read_responses_chat(body))


def read_contents(body: Mapping[str, Any], model: str = "auto") -> Parsed:
    return read_translated_chat("generate_content", body, read_gemini_chat(body, model))
