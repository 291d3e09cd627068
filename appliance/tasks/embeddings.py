"""Embeddings, OpenAI's endpoint: texts in, vectors out, the body verbatim.

`model` must name one: vectors of two models cannot be compared, so no other model ever answers in its place.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from appliance.core import ParsedRequest, Target, UpstreamCall, UpstreamReply
from appliance.core.json_types import JsonObject
from appliance.errors import BackendGarbage, RequestError, Unsupported
from appliance.tasks.reply_result import ReplyResult
from appliance.wire.strict_fields import missing, read_int, read_list, read_model, wrong
from appliance.wire.usage import estimate_tokens

MAX_INPUTS = 2_048
"""OpenAI's own limit."""


@dataclass(frozen=True, slots=True)
class EmbeddingsCall:
    body: JsonObject
    inputs: int
    prompt_tokens: int
    """Of the longest text: each is computed for itself."""

    def streams(self, target: Target) -> bool:
        return False

    def verified_late(self) -> None:
        return None

    @property
    def output_tokens(self) -> int:
        return 0

    def outgoing(self, target: Target) -> Sequence[UpstreamCall]:
        return (UpstreamCall("/embeddings", self.body),)

    def read(self, target: Target, replies: Sequence[UpstreamReply]) -> ReplyResult:
        """The target's payload, untouched. Raises BackendGarbage unless every text has its vector."""
        payload = replies[0].payload
        rows = payload.get("data") if isinstance(payload, dict) else None
        if not isinstance(rows, list) or len(rows) != self.inputs:
            raise BackendGarbage(f"the target's reply does not have {self.inputs} embeddings")
        wanted = str if self.body.get("encoding_format") == "base64" else list
        if not all(isinstance(row, dict) and isinstance(row.get("embedding"), wanted) for row in rows):
            raise BackendGarbage("an embedding of the target's reply is not in the format that was asked for")
        return ReplyResult(payload, replies[0].usage)


def read_embedding_request(body: JsonObject) -> tuple[ParsedRequest, Sequence[EmbeddingsCall]]:
    """Check an embeddings body. Raises RequestError naming field, value and remedy."""
    texts = _read_texts(body)
    model = read_model(body)
    if model == "auto":
        raise missing("model", "name one (GET /v1/models): vectors of different models cannot be compared")
    if body.get("encoding_format") not in (None, "float", "base64"):
        raise wrong("encoding_format", body["encoding_format"], "it must be float or base64")
    read_int(body, "dimensions", 1)
    asked = ParsedRequest(
        endpoint="embeddings", model=model, body=body, text="\n".join(texts), needs=frozenset({"embeddings"})
    )
    return asked, (EmbeddingsCall(body, len(texts), max(map(estimate_tokens, texts))),)


def _read_texts(body: JsonObject) -> Sequence[str]:
    given = body.get("input")
    if given is None:
        raise missing("input", f"it must be a text or a list of 1 to {MAX_INPUTS} texts")
    if isinstance(given, list):
        if given and isinstance(given[0], int | list):
            raise Unsupported(
                "input is a list of token ids: send text (ids mean something else to every model)", param="input"
            )
        texts = read_list(given, "input", 1, MAX_INPUTS, "texts")
    else:
        texts = [given]
    for index, text in enumerate(texts):
        path = f"input[{index}]" if isinstance(given, list) else "input"
        if not isinstance(text, str):
            raise wrong(path, text, "it must be a string")
        if not text:
            raise RequestError(f"{path} is empty: give a text", param=path)
    return texts
