"""Gemini's responses and their streams, read into OpenAI's chat completions."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import orjson

from appliance.core import Target, Usage
from appliance.errors import BackendGarbage, RejectedReply
from appliance.wire.sse import token_count
from appliance.wire.stream_translator import ChunkTranslator, completion

FINISHES: Final[Mapping[str, str]] = {
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

_BLOCKED: Final = "The provider's filter blocked this request."


def read_content(target: Target, payload: Mapping[str, Any]) -> tuple[dict[str, Any], Usage]:
    """A whole reply. Raises BackendGarbage, RejectedReply where the model made nothing that is an answer."""
    usage = read_counts(payload.get("usageMetadata")) or Usage()
    identity = str(payload.get("responseId") or "")
    candidates = payload.get("candidates")
    feedback = payload.get("promptFeedback")
    if not candidates and isinstance(feedback, Mapping) and feedback.get("blockReason"):
        choices = [_blocked(feedback)]
    elif isinstance(candidates, list) and candidates and all(isinstance(one, dict) for one in candidates):
        choices = [_choice(target, one, position, identity) for position, one in enumerate(candidates)]
    else:
        raise BackendGarbage(f"{target.name} answered without candidates")
    return completion(identity, str(payload.get("modelVersion") or target.model), choices, usage), usage


def _blocked(feedback: Mapping[str, Any]) -> dict[str, Any]:
    said = feedback.get("blockReasonMessage") or f"{_BLOCKED[:-1]} ({feedback.get('blockReason')})."
    message = {"role": "assistant", "content": None, "refusal": said}
    return {"index": 0, "message": message, "logprobs": None, "finish_reason": "content_filter"}


def _choice(target: Target, candidate: Mapping[str, Any], position: int, identity: str) -> dict[str, Any]:
    reason = str(candidate.get("finishReason") or "STOP")
    if reason not in FINISHES:
        said = candidate.get("finishMessage") or ""
        raise RejectedReply(f"{target.name} made no answer ({reason}) {said}".rstrip())
    index = candidate.get("index", position)
    pieces = GeminiParts(identity, index)
    delta = pieces.read((candidate.get("content") or {}).get("parts") or ())
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None, **delta}
    if "tool_calls" in message:
        message["tool_calls"] = [{key: call[key] for key in call if key != "index"} for call in message["tool_calls"]]
    finish = FINISHES[reason]
    if finish == "content_filter" and not message["content"]:
        message["refusal"] = candidate.get("finishMessage") or f"{_BLOCKED[:-1]} ({reason})."
    return {
        "index": index,
        "message": message,
        "logprobs": read_logprobs(candidate.get("logprobsResult")),
        "finish_reason": "tool_calls" if finish == "stop" and pieces.calls else finish,
    }


class GeminiParts:
    """One candidate's parts as they come, whole or in a stream."""

    def __init__(self, identity: str, index: int) -> None:
        self._identity = identity
        self._index = index
        self.calls = 0

    def read(self, parts: Sequence[Any]) -> dict[str, Any]:
        """The fields of a message or delta that these parts come to."""
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[dict[str, Any]] = []
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
        return {
            **({"content": "".join(texts)} if texts else {}),
            **({"reasoning_content": "".join(thoughts)} if thoughts else {}),
            **({"tool_calls": calls} if calls else {}),
            **({"extra_content": _signed(signature)} if signature else {}),
        }

    def _call(self, call: Mapping[str, Any], signature: str | None) -> dict[str, Any]:
        """Gemini may give no id; the one made here is unlike any other of the conversation."""
        number, self.calls = self.calls, self.calls + 1
        function = {"name": call.get("name"), "arguments": orjson.dumps(call.get("args") or {}).decode()}
        made = f"call_{self._identity or 'gemini'}_{self._index}_{number}"
        written = {"index": number, "id": call.get("id") or made, "type": "function", "function": function}
        return {**written, "extra_content": _signed(signature)} if signature else written


def _signed(signature: str) -> dict[str, Any]:
    return {"google": {"thought_signature": signature}}


def read_logprobs(result: Any) -> dict[str, Any] | None:
    if not isinstance(result, Mapping) or not isinstance(result.get("chosenCandidates"), list):
        return None
    tops = result.get("topCandidates") or []
    rows = []
    for index, chosen in enumerate(result["chosenCandidates"]):
        top = (tops[index].get("candidates") or []) if index < len(tops) else []
        rows.append({**_token(chosen), "top_logprobs": [_token(one) for one in top]})
    return {"content": rows, "refusal": None}


def _token(candidate: Mapping[str, Any]) -> dict[str, Any]:
    token = str(candidate.get("token") or "")
    return {
        "token": token,
        "logprob": candidate.get("logProbability") or 0.0,
        "bytes": list(token.encode("utf-8", "surrogatepass")),
    }


def read_counts(fields: Any) -> Usage | None:
    """Token counts; what is thought is billed as output, and what tools bring in as input."""
    if not isinstance(fields, Mapping):
        return None
    prompt = token_count(fields.get("promptTokenCount"))
    if prompt is None:
        return None
    thoughts = token_count(fields.get("thoughtsTokenCount")) or 0
    return Usage(
        prompt_tokens=prompt + (token_count(fields.get("toolUsePromptTokenCount")) or 0),
        completion_tokens=(token_count(fields.get("candidatesTokenCount")) or 0) + thoughts,
        cached_tokens=token_count(fields.get("cachedContentTokenCount")) or 0,
        reasoning_tokens=thoughts,
    )


class GeminiStreamTranslator(ChunkTranslator):
    """A stream of responses, each with the parts that are new. The last one of a candidate has its finish reason; the
    stream itself has no event at its end."""

    def __init__(self, model: str, *, keep_usage: bool, choices: int) -> None:
        super().__init__(model, keep_usage=keep_usage)
        self._choices = choices
        self._pieces: dict[int, GeminiParts] = {}

    def _take(self, event: dict[str, Any]) -> Iterator[bytes]:
        if event.get("error"):
            self.error = event["error"]
            return
        self.identity = str(event.get("responseId") or self.identity)
        self._model = str(event.get("modelVersion") or self._model)
        self.usage = read_counts(event.get("usageMetadata")) or self.usage
        feedback = event.get("promptFeedback")
        if not event.get("candidates") and isinstance(feedback, Mapping) and feedback.get("blockReason"):
            refusal = _blocked(feedback)["message"]["refusal"]
            yield self._chunk({"role": "assistant", "refusal": refusal}, finish="content_filter")
        for position, candidate in enumerate(event.get("candidates") or ()):
            yield from self._candidate(candidate, candidate.get("index", position))

    def _candidate(self, candidate: Mapping[str, Any], index: int) -> Iterator[bytes]:
        is_first = index not in self._pieces
        pieces = self._pieces.setdefault(index, GeminiParts(self.identity, index))
        delta = pieces.read((candidate.get("content") or {}).get("parts") or ())
        more = {"logprobs": logprobs} if (logprobs := read_logprobs(candidate.get("logprobsResult"))) else {}
        if is_first:
            delta = {"role": "assistant", **delta}
        reason = candidate.get("finishReason")
        if delta or more:
            yield self._chunk(delta, index=index, more=more)
        if reason is None:
            return
        if reason not in FINISHES:
            self.error = {"message": f"no answer came about ({reason}) {candidate.get('finishMessage') or ''}".rstrip()}
            return
        finish = FINISHES[reason]
        yield self._chunk({}, index=index, finish="tool_calls" if finish == "stop" and pieces.calls else finish)

    def _last(self) -> bytes:
        is_over = self.finished_choices >= self._choices or (self.finished_choices > 0 and not self._pieces)
        return self._finish() if is_over and self.error is None and not self.done else b""
