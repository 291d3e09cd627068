"""Gemini's responses and a chat's replies, each made of the other; what ends them, and how errors look."""

import base64
from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias, cast

from appliance.core import Target, Usage
from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.errors import ApplianceError, BackendGarbage, RejectedReply
from appliance.wire.chat_ir import (
    ChatChoice,
    ChatDelta,
    ChatMessage,
    ChoiceLogprobs,
    FinishReason,
    TokenLogprob,
    ToolCall,
    json_text,
    reasoning_text,
)
from appliance.wire.chat_replies import check_choices, make_completion, read_reply_call
from appliance.wire.dialect import WireRequest
from appliance.wire.opaque_state import foreign_state, pack_state
from appliance.wire.strict_fields import StrictFields
from appliance.wire.usage import UsageShape, read_usage

Part: TypeAlias = MutableJsonObject

GEMINI_USAGE: Final = UsageShape(
    prompt=("promptTokenCount", "toolUsePromptTokenCount"),
    completion=("candidatesTokenCount", "thoughtsTokenCount"),
    cached="cachedContentTokenCount",
    reasoning="thoughtsTokenCount",
)
"""What is thought is billed as output, and what tools bring in as input."""

FINISH_REASONS: Final[Mapping[str, FinishReason]] = {
    "STOP": "stop",
    "MAX_TOKENS": "length",
    "CONTINUATION": "length",
    "SAFETY": "content_filter",
    "RECITATION": "content_filter",
    "LANGUAGE": "content_filter",
    "BLOCKLIST": "content_filter",
    "PROHIBITED_CONTENT": "content_filter",
    "SPII": "content_filter",
    "IMAGE_SAFETY": "content_filter",
    "IMAGE_PROHIBITED_CONTENT": "content_filter",
    "IMAGE_RECITATION": "content_filter",
    "MODEL_ARMOR": "content_filter",
    "ESCALATION": "content_filter",
    "PUP_LIMITED_DISABLED": "content_filter",
}
"""All others mean that no answer came about: a call that could not be read, say."""
STOP_REASONS: Final[Mapping[str, str]] = {
    "stop": "STOP",
    "length": "MAX_TOKENS",
    "tool_calls": "STOP",
    "function_call": "STOP",
    "content_filter": "SAFETY",
}
"""The way back: a chat's finish reason -> Gemini's."""

_BLOCKED: Final = "The provider's filter blocked this request."

_ERROR_STATUSES: Final[Mapping[int, str]] = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    409: "ABORTED",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
"""Google's names for them; others below 500 are INVALID_ARGUMENT, the rest INTERNAL."""
_GOOGLE_RPC: Final = "type.googleapis.com/google.rpc."


# A target's reply, read.


def read_gemini_reply(request: WireRequest, payload: JsonObject) -> tuple[JsonObject, Usage]:
    """A whole response as a chat completion.

    Raises BackendGarbage, RejectedReply where the model made nothing that is an answer.
    """
    target = request.target
    usage = GEMINI_USAGE.read(payload.get("usageMetadata")) or Usage()
    identity = str(payload.get("responseId") or "")
    candidates, refusal = payload.get("candidates"), read_block(payload)
    if refusal is not None:
        choices = [_blocked_choice(refusal)]
    elif isinstance(candidates, list) and candidates and all(isinstance(one, dict) for one in candidates):
        choices = [_read_choice(target, one, position, identity) for position, one in enumerate(candidates)]
    else:
        raise BackendGarbage(f"{target.name} answered without candidates")
    return make_completion(identity, str(payload.get("modelVersion") or target.model), choices, usage), usage


def read_block(payload: JsonObject) -> str | None:
    """Why the prompt was blocked; None where it was not."""
    feedback = payload.get("promptFeedback")
    if payload.get("candidates") or not isinstance(feedback, Mapping) or not feedback.get("blockReason"):
        return None
    return feedback.get("blockReasonMessage") or f"{_BLOCKED[:-1]} ({feedback['blockReason']})."


def _blocked_choice(refusal: str) -> ChatChoice:
    message: ChatMessage = {"role": "assistant", "content": None, "refusal": refusal}
    return {"index": 0, "message": message, "logprobs": None, "finish_reason": "content_filter"}


def _read_choice(target: Target, candidate: JsonObject, position: int, identity: str) -> ChatChoice:
    reason = str(candidate.get("finishReason") or "STOP")
    if reason not in FINISH_REASONS:
        said = candidate.get("finishMessage") or ""
        raise RejectedReply(f"{target.name} made no answer ({reason}) {said}".rstrip())
    index = candidate.get("index", position)
    parts = CandidateParts(identity, index)
    delta = parts.read((candidate.get("content") or {}).get("parts") or ())
    message: ChatMessage = {"role": "assistant", "content": None, "refusal": None}
    message.update(cast(ChatMessage, delta))
    for call in message.get("tool_calls") or ():
        del call["index"]
    finish = parts.finish_reason(reason)
    if finish == "content_filter" and not message["content"]:
        message["refusal"] = candidate.get("finishMessage") or f"{_BLOCKED[:-1]} ({reason})."
    logprobs = read_logprobs(candidate.get("logprobsResult"))
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}


class CandidateParts:
    """One candidate's parts as they come, whole or in a stream."""

    def __init__(self, identity: str, index: int) -> None:
        self._identity = identity
        self._index = index
        self.calls = 0

    def read(self, parts: Sequence[object]) -> ChatDelta:
        """The fields of a message or delta that these parts come to."""
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[ToolCall] = []
        signature = None
        for part in parts:
            if not isinstance(part, Mapping):
                continue
            if isinstance(part.get("functionCall"), Mapping):
                calls.append(self._call(part["functionCall"], part.get("thoughtSignature")))
                continue
            signature = part.get("thoughtSignature") or signature
            if isinstance(part.get("text"), str):
                (thoughts if part.get("thought") else texts).append(part["text"])
        delta: ChatDelta = {}
        if texts:
            delta["content"] = "".join(texts)
        if thoughts:
            delta["reasoning_content"] = "".join(thoughts)
        if calls:
            delta["tool_calls"] = calls
        if signature:
            delta["extra_content"] = signed_content(signature)
        return delta

    def finish_reason(self, reason: str) -> FinishReason:
        """A chat's finish reason for Gemini's. Raises KeyError for those that mean no answer."""
        finish = FINISH_REASONS[reason]
        return "tool_calls" if finish == "stop" and self.calls else finish

    def _call(self, call: JsonObject, signature: str | None) -> ToolCall:
        """Gemini may give no id; the one made here is unlike any other of the conversation."""
        number, self.calls = self.calls, self.calls + 1
        made = f"call_{self._identity or 'gemini'}_{self._index}_{number}"
        written: ToolCall = {"index": number, "id": call.get("id") or made, "type": "function"}
        written["function"] = {"name": call["name"], "arguments": json_text(call.get("args") or {})}
        if signature:
            written["extra_content"] = signed_content(signature)
        return written


def signed_content(signature: str) -> JsonObject:
    """A thought signature where Google's OpenAI-compatible endpoint puts it."""
    return {"google": {"thought_signature": signature}}


def read_signature(holder: ChatDelta | ToolCall) -> str | None:
    """The thought signature of a message, delta or tool call."""
    extra: object = holder.get("extra_content")
    google = extra.get("google") if isinstance(extra, Mapping) else None
    signature = google.get("thought_signature") if isinstance(google, Mapping) else None
    return signature if isinstance(signature, str) and signature else None


def read_logprobs(result: object) -> ChoiceLogprobs | None:
    if not isinstance(result, Mapping) or not isinstance(result.get("chosenCandidates"), list):
        return None
    tops = result.get("topCandidates") or []
    rows: list[TokenLogprob] = []
    for index, chosen in enumerate(result["chosenCandidates"]):
        top = (tops[index].get("candidates") or []) if index < len(tops) else []
        rows.append({**_read_token(chosen), "top_logprobs": [_read_token(one) for one in top]})
    return {"content": rows, "refusal": None}


def _read_token(candidate: JsonObject) -> TokenLogprob:
    token = str(candidate.get("token") or "")
    return {
        "token": token,
        "logprob": candidate.get("logProbability") or 0.0,
        "bytes": list(token.encode("utf-8", "surrogatepass")),
    }


# A chat's reply, written for a caller.


def write_gemini_reply(payload: JsonObject, original: JsonObject) -> JsonObject:
    """The response for a chat `payload`; `original` is the body that asked. Raises BackendGarbage."""
    shows_thoughts = wants_thoughts(original)
    candidates = []
    for position, choice in enumerate(check_choices(payload, "message")):
        message = choice["message"]
        parts = write_parts(message, shows_thoughts)
        parts += [write_call_part(call) for call in message.get("tool_calls") or ()]
        signed = sign_parts(parts, message)
        candidate = write_candidate(choice.get("index", position), signed, choice, bool(message.get("refusal")))
        logprobs = candidate.get("logprobsResult")
        if logprobs is not None:
            chosen = [one["logProbability"] for one in logprobs["chosenCandidates"]]
            candidate["avgLogprobs"] = sum(chosen) / len(chosen) if chosen else 0.0
        candidates.append(candidate)
    usage = write_gemini_usage(read_usage(payload.get("usage")) or Usage())
    return {"candidates": candidates, "usageMetadata": usage, **write_head(payload)}


def wants_thoughts(original: JsonObject) -> bool:
    """Whether the caller wants to see what the model thought."""
    config = StrictFields(original, snake=True).object("generationConfig")
    thinking = None if config is None else config.object("thinkingConfig")
    return thinking is not None and thinking.get("includeThoughts") is True


def write_head(payload: JsonObject) -> JsonObject:
    """What stands on a response beside its candidates. `payload`: a chat completion or chunk."""
    return {"modelVersion": payload.get("model") or "unknown", "responseId": str(payload.get("id") or "")}


def write_gemini_usage(usage: Usage) -> JsonObject:
    """Thinking is counted beside the answer here, not as part of it."""
    thought = min(usage.reasoning_tokens, usage.completion_tokens)
    counts = {
        "promptTokenCount": usage.prompt_tokens,
        "candidatesTokenCount": usage.completion_tokens - thought,
        "totalTokenCount": usage.prompt_tokens + usage.completion_tokens,
    }
    if usage.cached_tokens:
        counts["cachedContentTokenCount"] = usage.cached_tokens
    if thought:
        counts["thoughtsTokenCount"] = thought
    return counts


def write_call_part(call: ToolCall) -> Part:
    function, arguments = read_reply_call(call)
    made: Part = {"functionCall": {"id": str(call.get("id") or ""), "name": function.get("name"), "args": arguments}}
    signature = read_signature(call)
    return made if signature is None else {**made, "thoughtSignature": signature}


def write_parts(message: ChatDelta, shows_thoughts: bool) -> list[Part]:
    parts: list[Part] = []
    thought = reasoning_text(message)
    if shows_thoughts and thought:
        parts.append({"text": thought, "thought": True})
    for text in (message.get("content"), message.get("refusal")):
        if isinstance(text, str) and text:
            parts.append({"text": text})
    return parts


def sign_parts(parts: list[Part], message: ChatDelta) -> list[Part]:
    """The parts, the first without a signature carrying the message's: Gemini's own, or what other dialects want."""
    signature = read_signature(message) or _packed_state(message)
    if signature is None:
        return parts
    for part in parts:
        if "thoughtSignature" not in part:
            part["thoughtSignature"] = signature
            return parts
    return [*parts, {"text": "", "thoughtSignature": signature}]


def _packed_state(message: ChatDelta) -> str | None:
    blocks = message.get("thinking_blocks")
    foreign = foreign_state({"thinking_blocks": blocks}) if blocks else None
    return base64.b64encode(pack_state(foreign).encode()).decode() if foreign else None


def write_candidate(
    index: int, parts: Sequence[Part], choice: ChatChoice, is_refusal: bool = False
) -> MutableJsonObject:
    """A refusal's words stand in the text; that it is one is said by the reason, as Google's own models do."""
    made: MutableJsonObject = {"content": {"role": "model", "parts": list(parts) or [{"text": ""}]}, "index": index}
    reason = choice.get("finish_reason")
    if reason:
        made["finishReason"] = "SAFETY" if is_refusal else STOP_REASONS.get(str(reason), "OTHER")
    logprobs = _write_logprobs(choice)
    if logprobs is not None:
        made["logprobsResult"] = logprobs
    return made


def _write_logprobs(choice: ChatChoice) -> JsonObject | None:
    given: object = choice.get("logprobs")
    rows = given.get("content") if isinstance(given, Mapping) else None
    if not isinstance(rows, list):
        return None
    return {
        "chosenCandidates": [_write_token(row) for row in rows],
        "topCandidates": [{"candidates": [_write_token(top) for top in row.get("top_logprobs") or ()]} for row in rows],
    }


def _write_token(row: TokenLogprob) -> JsonObject:
    return {"token": row.get("token"), "logProbability": row.get("logprob") or 0.0}


def write_gemini_error(error: ApplianceError, request_id: str | None = None) -> JsonObject:
    """The body of an error of Google's APIs, with the details that those define."""
    status = _ERROR_STATUSES.get(error.status, "INTERNAL" if error.status >= 500 else "INVALID_ARGUMENT")
    details: list[JsonObject] = [
        {"@type": f"{_GOOGLE_RPC}ErrorInfo", "reason": error.code.upper(), "domain": "appliance"}
    ]
    if error.param is not None:
        violation = {"field": error.param, "description": error.message}
        details.append({"@type": f"{_GOOGLE_RPC}BadRequest", "fieldViolations": [violation]})
    if error.retry_after_seconds is not None:
        details.append({"@type": f"{_GOOGLE_RPC}RetryInfo", "retryDelay": f"{error.retry_after_seconds:.3f}s"})
    if request_id is not None:
        details.append({"@type": f"{_GOOGLE_RPC}RequestInfo", "requestId": request_id})
    return {"error": {"code": error.status, "message": error.message, "status": status, "details": details}}
