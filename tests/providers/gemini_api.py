"""A stand-in for Gemini's generateContent, built with the official SDK's types."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import orjson
from pydantic import BaseModel, ValidationError

from tests.providers.served import Served, Speech
from tests.providers.speech import Called, Cut, Fail, Say

with warnings.catch_warnings():
    # one of its docstrings has a bad escape, which the first import after an installation warns of
    warnings.simplefilter("ignore")
    from google.genai import types

SIGNATURE = b"signed by the model"
_PATH: Final = re.compile(r"/models/[\w.-]+:(generateContent|streamGenerateContent)")
_FIELDS: Final[Mapping[str, type[BaseModel]]] = {
    "systemInstruction": types.Content,
    "contents": types.Content,
    "tools": types.Tool,
    "toolConfig": types.ToolConfig,
    "generationConfig": types.GenerationConfig,
    "safetySettings": types.SafetySetting,
}
_PLAIN: Final = frozenset({"cachedContent", "serviceTier", "labels"})
_REASONS: Final = {"stop": "STOP", "length": "MAX_TOKENS"}


class GeminiApi(Served):
    """`gives_ids`: whether its function calls have ids; not all models' have."""

    version = "/v1beta"
    gives_ids = True

    def wrong_with(self, path: str, body: dict[str, Any]) -> Iterable[str]:
        if _PATH.fullmatch(path) is None:
            yield f"no endpoint {path}"
        if ("streamGenerate" in path) != self.paths[-1].endswith("alt=sse"):
            yield "a stream is asked for by alt=sse"
        if self.headers[-1].get("x-goog-api-key") != "sk-secret":
            yield "no x-goog-api-key"
        for name, value in body.items():
            if name in _FIELDS:
                for one in value if isinstance(value, list) else [value]:
                    yield from _wrong(_FIELDS[name], name, one)
            elif name not in _PLAIN:
                yield f"{name} is not known"
        yield from _wrong_contents(body.get("contents") or [])

    def is_stream(self, path: str, body: Mapping[str, Any]) -> bool:
        return "streamGenerateContent" in path

    def misunderstood(self, said: str) -> Fail:
        return Fail(400, "INVALID_ARGUMENT", said)

    def error(self, fail: Fail) -> Any:
        return {"error": {"code": fail.status, "message": fail.message, "status": fail.kind}}

    def whole(self, path: str, body: Mapping[str, Any], say: Say) -> bytes:
        if say.finish == "refusal":
            return _blocked(say).model_dump_json(by_alias=True, exclude_none=True).encode()
        content = types.Content(role="model", parts=self._parts(say, [say.text] if say.text else []))
        choices = (body.get("generationConfig") or {}).get("candidateCount") or 1
        reply = types.GenerateContentResponse(
            response_id="resp-1",
            model_version=path.split("/")[-1].split(":")[0],
            candidates=[
                types.Candidate(index=index, content=content, finish_reason=_finish(say)) for index in range(choices)
            ],
            usage_metadata=_usage(say),
        )
        return reply.model_dump_json(by_alias=True, exclude_none=True).encode()

    def events(self, path: str, body: Mapping[str, Any], speech: Speech) -> Iterable[bytes]:
        say = speech if isinstance(speech, Say) else Say(text=getattr(speech, "text", "so far"))
        if say.finish == "refusal":
            yield _event(_blocked(say))
            return
        parts = self._parts(say, say.pieces)
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            candidate = types.Candidate(
                index=0,
                content=types.Content(role="model", parts=[part]),
                finish_reason=_finish(say) if is_last and isinstance(speech, Say) else None,
            )
            yield _event(
                types.GenerateContentResponse(
                    response_id="resp-1", model_version="gem", candidates=[candidate], usage_metadata=_usage(say)
                )
            )
            if isinstance(speech, Cut):
                return
            if isinstance(speech, Fail):
                yield b"data: " + orjson.dumps(self.error(speech)) + b"\r\n\r\n"
                return

    def _parts(self, say: Say, texts: Sequence[str]) -> list[types.Part]:
        parts = [types.Part(text=say.thought, thought=True)] if say.thought else []
        parts += [types.Part(text=text) for text in texts]
        for number, call in enumerate(say.calls):
            signature = SIGNATURE if say.thought and number == 0 else None
            parts.append(types.Part(function_call=self._call(call), thought_signature=signature))
        if say.thought and not say.calls:
            parts[-1].thought_signature = SIGNATURE
        return parts

    def _call(self, call: Called) -> types.FunctionCall:
        return types.FunctionCall(id=call.id if self.gives_ids else None, name=call.name, args=dict(call.arguments))


def _finish(say: Say) -> types.FinishReason:
    return types.FinishReason(_REASONS[say.finish])


def _usage(say: Say) -> types.GenerateContentResponseUsageMetadata:
    return types.GenerateContentResponseUsageMetadata(
        prompt_token_count=say.prompt_tokens,
        cached_content_token_count=say.cached_tokens or None,
        candidates_token_count=say.output_tokens - say.thought_tokens,
        thoughts_token_count=say.thought_tokens or None,
        total_token_count=say.prompt_tokens + say.output_tokens,
    )


def _blocked(say: Say) -> types.GenerateContentResponse:
    return types.GenerateContentResponse(
        response_id="resp-1",
        prompt_feedback=types.GenerateContentResponsePromptFeedback(
            block_reason=types.BlockedReason.SAFETY, block_reason_message=say.refusal
        ),
        usage_metadata=types.GenerateContentResponseUsageMetadata(
            prompt_token_count=say.prompt_tokens, total_token_count=say.prompt_tokens
        ),
    )


def _event(response: types.GenerateContentResponse) -> bytes:
    """The real one ends its lines with CRLF."""
    return b"data: " + response.model_dump_json(by_alias=True, exclude_none=True).encode() + b"\r\n\r\n"


def _wrong(model: type[BaseModel], name: str, value: Any) -> Iterable[str]:
    try:
        model.model_validate_json(orjson.dumps(value))
    except ValidationError as error:
        for one in error.errors()[:5]:
            yield f"{name}.{'.'.join(str(part) for part in one['loc'])}: {one['msg']}"


def _wrong_contents(contents: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """What types cannot say: as many results in a turn as calls in the one before."""
    calls = 0
    for index, content in enumerate(contents):
        results = sum("functionResponse" in part for part in content["parts"])
        if results != calls:
            yield f"contents.{index}: {results} function responses for {calls} function calls"
        calls = sum("functionCall" in part for part in content["parts"])
        if content.get("role") not in ("user", "model"):
            yield f"contents.{index}: role {content.get('role')!r}"
