"""Bodies of each dialect as requests, read as their endpoints read them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from appliance.core import ParsedRequest
from appliance.tasks.chat import ChatCall, read_translated_chat
from appliance.wire.gemini.inbound import read_gemini_chat
from appliance.wire.registry import INBOUND

Parsed = tuple[ParsedRequest, Sequence[ChatCall]]


def read_messages(body: Mapping[str, Any]) -> Parsed:
    return read_translated_chat(INBOUND["messages"], body)


def read_responses(body: Mapping[str, Any]) -> Parsed:
    return read_translated_chat(INBOUND["responses"], body)


def read_contents(body: Mapping[str, Any], model: str = "auto") -> Parsed:
    dialect = replace(INBOUND["generate_content"], read_chat=partial(read_gemini_chat, model=model))
    return read_translated_chat(dialect, body)
