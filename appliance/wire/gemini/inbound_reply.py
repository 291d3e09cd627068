"""A chat's reply, whole or as a stream, as Gemini's responses."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson

from appliance.errors import ApplianceError, BackendGarbage
from appliance.wire.chat_stream import counts_of, reasoning_of
from appliance.wire.gemini.inbound import wants_thoughts
from appliance.wire.opaque_state import foreign_of, pack
from appliance.wire.openai.reply_checks import choices_of

Part = dict[str, Any]

_REASONS: Final[Mapping[str, str]] = {
    "stop": "STOP",
    "length": "MAX_TOKENS",
    "tool_calls": "STOP",
    "function_call": "STOP",
    "content_filter": "SAFETY",
}
_NO_BLOCKS_OF_ITS_OWN: Final[frozenset[str]] = frozenset()


def content_of(payload: Mapping[str, Any], original: Mapping[str, Any]) -> Mapping[str, Any]:
    """The response for a chat `payload`; `original` is the body that asked. Raises BackendGarbage."""
    shows_thoughts = wants_thoughts(original)
    candidates = []
    for position, choice in enumerate(choices_of(payload, "message")):
        parts = _parts(choice["message"], shows_thoughts)
        parts += [call_part(call) for call in choice["message"].get("tool_calls") or ()]
        signed = _signed(parts, choice["message"])
        candidate = _candidate(choice.get("index", position), signed, choice, bool(choice["message"].get("refusal")))
        logprobs = _logprobs(choice)
        if logprobs is not None:
            candidate["logprobsResult"] = logprobs
            chosen = [one["logProbability"] for one in logprobs["chosenCandidates"]]
            candidate["avgLogprobs"] = sum(chosen) / len(chosen) if chosen else 0.0
        candidates.append(candidate)
    return {"candidates": candidates, "usageMetadata": usage_of(payload.get("usage")), **head_of(payload)}


def head_of(payload: Mapping[str, Any]) -> dict[str, Any]:
    return {"modelVersion": payload.get("model") or "unknown", "responseId": str(payload.get("id") or "")}


def usage_of(usage: Any) -> Mapping[str, Any]:
    """Thinking is counted beside the answer here, not as part of it."""
    prompt, cached, answer, reasoning = counts_of(usage)
    thought = min(reasoning, answer)
    counts = {
        "promptTokenCount": prompt,
        "candidatesTokenCount": answer - thought,
        "totalTokenCount": prompt + answer,
    }
    if cached:
        counts["cachedContentTokenCount"] = cached
    if thought:
        counts["thoughtsTokenCount"] = thought
    return counts


def call_part(call: Any) -> Part:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise BackendGarbage("a tool call of the target's reply has no function")
    try:
        given = orjson.loads(function.get("arguments") or "{}")
    except (orjson.JSONDecodeError, TypeError) as error:
        raise BackendGarbage("the arguments of a tool call are not JSON") from error
    made: Part = {"functionCall": {"id": str(call.get("id") or ""), "name": function.get("name"), "args": given}}
    signature = _own_signature(call)
    return made if signature is None else {**made, "thoughtSignature": signature}


def _parts(message: Mapping[str, Any], shows_thoughts: bool) -> list[Part]:
    parts: list[Part] = []
    if shows_thoughts and reasoning_of(message):
        parts.append({"text": reasoning_of(message), "thought": True})
    for name in ("content", "refusal"):
        if isinstance(message.get(name), str) and message[name]:
            parts.append({"text": message[name]})
    return parts


def _own_signature(holder: Mapping[str, Any]) -> str | None:
    extra = holder.get("extra_content")
    google = extra.get("google") if isinstance(extra, dict) else None
    signature = google.get("thought_signature") if isinstance(google, dict) else None
    return signature if isinstance(signature, str) and signature else None


def _foreign(message: Mapping[str, Any]) -> str | None:
    """What other dialects want back, in the form of a signature."""
    foreign = foreign_of({"thinking_blocks": message.get("thinking_blocks")}, _NO_BLOCKS_OF_ITS_OWN)
    return base64.b64encode(pack(foreign).encode()).decode() if foreign else None


def _signed(parts: list[Part], message: Mapping[str, Any]) -> list[Part]:
    """The parts, the first that has room carrying the message's signature."""
    signature = _own_signature(message) or _foreign(message)
    if signature is None:
        return parts
    for part in parts:
        if "thoughtSignature" not in part:
            part["thoughtSignature"] = signature
            return parts
    return [*parts, {"text": "", "thoughtSignature": signature}]


def _candidate(
    index: int, parts: Sequence[Part], choice: Mapping[str, Any], is_refusal: bool = False
) -> dict[str, Any]:
    """A refusal's words stand in the text; that it is one is told by the reason, as Google's own models do."""
    made: dict[str, Any] = {"content": {"role": "model", "parts": list(parts) or [{"text": ""}]}, "index": index}
    reason = choice.get("finish_reason")
    if reason:
        made["finishReason"] = "SAFETY" if is_refusal else _REASONS.get(str(reason), "OTHER")
    return made


def _logprobs(choice: Mapping[str, Any]) -> dict[str, Any] | None:
    given = choice.get("logprobs")
    rows = given.get("content") if isinstance(given, dict) else None
    if not isinstance(rows, list):
        return None
    return {
        "chosenCandidates": [_token(row) for row in rows],
        "topCandidates": [{"candidates": [_token(top) for top in row.get("top_logprobs") or ()]} for row in rows],
    }


def _token(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"token": row.get("token"), "logProbability": row.get("logprob") or 0.0}


class GeminiStreamWriter:
    """A stream of responses: as events, or as a JSON list that grows. Function calls are given once they are whole."""

    def __init__(self, original: Mapping[str, Any], *, as_events: bool) -> None:
        self._shows_thoughts = wants_thoughts(original)
        self._as_events = as_events
        self._count = 0
        self._head = head_of({})
        self._usage: Any = None
        self._calls: dict[tuple[int, int], dict[str, Any]] = {}
        self._finished: dict[int, Mapping[str, Any]] = {}
        self._refused: set[int] = set()

    def feed(self, chunk: Mapping[str, Any]) -> bytes:
        if chunk.get("id"):
            self._head = head_of(chunk)
        if isinstance(chunk.get("usage"), dict):
            self._usage = chunk["usage"]
        out = b""
        for choice in chunk.get("choices") or ():
            index, delta = choice.get("index") or 0, choice.get("delta") or {}
            if delta.get("refusal"):
                self._refused.add(index)
            parts = _signed(_parts(delta, self._shows_thoughts), delta)
            parts = [*self._whole_calls(index, delta), *parts] if delta.get("tool_calls") else parts
            if parts:
                candidate = _candidate(index, parts, {})
                logprobs = _logprobs(choice)
                out += self._response([candidate if logprobs is None else {**candidate, "logprobsResult": logprobs}])
            if choice.get("finish_reason"):
                self._finished[index] = choice
        return out

    def end(self) -> bytes:
        """What ends an answer comes with its usage, in the last response."""
        candidates = [
            _candidate(index, self._rest_of(index), choice, index in self._refused)
            for index, choice in sorted(self._finished.items())
        ]
        candidates = candidates or [_candidate(0, self._rest_of(0), {"finish_reason": "stop"})]
        return self._response(candidates, usageMetadata=usage_of(self._usage)) + (b"" if self._as_events else b"]")

    def fail(self, error: ApplianceError) -> bytes:
        return self._written(error.to_gemini()) + (b"" if self._as_events else b"]")

    def _whole_calls(self, index: int, delta: Mapping[str, Any]) -> list[Part]:
        """Take in pieces of calls; the calls before the one that a piece belongs to are whole."""
        done: list[Part] = []
        for piece in delta["tool_calls"]:
            number = piece.get("index")
            if number is None:  # some servers send each call whole, without one
                number = sum(1 for one, _ in self._calls if one == index)
            if (index, number) not in self._calls:
                done += self._rest_of(index)
                self._calls[index, number] = {"arguments": []}
            call = self._calls[index, number]
            if "part" in call:
                raise ValueError("a tool call goes on after the next one began")
            function = piece.get("function") or {}
            for name, value in (("id", piece.get("id")), ("name", function.get("name"))):
                if value:
                    call[name] = value
            if isinstance(piece.get("extra_content"), dict):
                call["extra_content"] = piece["extra_content"]
            call["arguments"].append(function.get("arguments") or "")
        return done

    def _rest_of(self, index: int) -> list[Part]:
        """The calls of one candidate that have not been given yet."""
        parts = []
        for (owner, _), call in self._calls.items():
            if owner == index and "part" not in call:
                function = {"name": call["name"], "arguments": "".join(call["arguments"])}
                call["part"] = True
                parts.append(call_part({**call, "function": function}))
        return parts

    def _response(self, candidates: Sequence[Mapping[str, Any]], **more: Any) -> bytes:
        return self._written({"candidates": list(candidates), **more, **self._head})

    def _written(self, response: Mapping[str, Any]) -> bytes:
        self._count += 1
        if self._as_events:
            return b"data: " + orjson.dumps(response) + b"\r\n\r\n"
        return (b"[" if self._count == 1 else b",\r\n") + orjson.dumps(response)
