"""Requests of Gemini's generateContent to a target that speaks it: as they came."""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from appliance.core import Target, UpstreamCall
from appliance.core.json_types import JsonObject
from appliance.wire.dialect import WireRequest, make_wire_request, most_output_tokens
from appliance.wire.forward import ForwardedStream, has_quirks, read_limit
from appliance.wire.gemini.outbound import write_path
from appliance.wire.gemini.reply import FINISH_REASONS, GEMINI_USAGE
from appliance.wire.opaque_state import MARK

_ASK_FOR_NOTHING: Final = frozenset({"cachedContent", "cached_content", "labels", "model", "store"})
"""Fields that callers may send only with values that ask for nothing; the model stands in the address."""

_PACKED: Final = base64.b64encode(MARK.encode()[: len(MARK) // 3 * 3]).decode()
"""How a thought signature begins that holds what another provider wants back."""


def forward_gemini_request(target: Target, outgoing: UpstreamCall, *, stream: bool) -> WireRequest | None:
    """None where a signature has to be rewritten, or for a field that the target cannot take."""
    assert outgoing.original is not None
    given, reasons = outgoing.original.body, "reasoning" in target.abilities
    name, settings = _either(given, "generationConfig", "generation_config")
    thinks = isinstance(settings, Mapping) and _either(settings, "thinkingConfig", "thinking_config")[1]
    if has_quirks(target, outgoing) or (thinks and not reasons):
        return None
    if not all(_is_own(content, needs_signature=reasons) for content in given["contents"]):
        return None
    body = {name: value for name, value in given.items() if name not in _ASK_FOR_NOTHING}
    body["contents"] = [_with_role(content) for content in given["contents"]]
    limit = read_limit(outgoing) or target.wire.max_output_tokens
    if limit is not None:
        body[name] = _limited(settings or {}, limit)
    request = make_wire_request(target, outgoing, write_path(target, stream=stream), body, is_forwarded=True)
    return replace(request, most_output_tokens=_most(target, limit, outgoing))


def _either(body: JsonObject, name: str, other: str) -> tuple[str, Any]:
    """A field under one of the two names that the API knows it by."""
    return (other, body[other]) if body.get(other) is not None else (name, body.get(name))


def _limited(settings: JsonObject, limit: int) -> JsonObject:
    name, given = _either(settings, "maxOutputTokens", "max_output_tokens")
    return settings if given == limit else {**settings, name: limit}


def _most(target: Target, limit: int | None, outgoing: UpstreamCall) -> int | None:
    return most_output_tokens(target, outgoing, {"maxOutputTokens": limit, "n": outgoing.body.get("n")})


def _is_own(content: JsonObject, *, needs_signature: bool) -> bool:
    """Whether the API can read each signature. A model that thinks wants one on the first call of each turn."""
    is_first_call = True
    parts: Sequence[JsonObject] = content.get("parts") or ()
    for part in parts:
        signature = _either(part, "thoughtSignature", "thought_signature")[1]
        if isinstance(signature, str) and signature.startswith(_PACKED):
            return False
        if _either(part, "functionCall", "function_call")[1] is not None:
            if is_first_call and needs_signature and not signature:
                return False
            is_first_call = False
    return True


def _with_role(content: JsonObject) -> JsonObject:
    """Callers may leave the role out, or give the older one of functions; some servers take neither."""
    return content if content.get("role") in ("user", "model") else {**content, "role": "user"}


class GeminiForwardedStream(ForwardedStream):
    """Every event may have counts. The last one of a candidate has its finish reason; the stream has no end event."""

    __slots__ = ("_is_blocked",)
    notable = re.compile(rb'"(?:usageMetadata|finishReason|blockReason|error)"\s*:')

    def __init__(self, request: WireRequest) -> None:
        super().__init__(request)
        self._is_blocked = False

    def end(self) -> bytes:
        rest = super().end()
        is_over = self.finished_choices >= self._choices or self._is_blocked
        self.done = is_over and self.error is None
        return rest

    def read_event(self, event: JsonObject) -> bool:
        if event.get("error"):
            self.error = event["error"]
            return False
        self.usage = GEMINI_USAGE.read(event.get("usageMetadata")) or self.usage
        feedback = event.get("promptFeedback")
        if not event.get("candidates") and isinstance(feedback, Mapping) and feedback.get("blockReason"):
            self._is_blocked = True
            self.finished_choices = self._choices
        for candidate in event.get("candidates") or ():
            reason = candidate.get("finishReason")
            if reason is not None and reason not in FINISH_REASONS:
                self.error = {"message": f"no answer came about ({reason})"}
            self.finished_choices += reason is not None
        return True
