"""Whether a set of replies is an answer at all, before the call itself reads them. Pure and small."""

from collections.abc import Sequence
from typing import Any

from appliance.core import StreamCheck, Target, TaskCall, UpstreamCall, UpstreamReply
from appliance.errors import BackendGarbage, RejectedReply
from appliance.wire.streams import StreamTranslator

_MUST_HAVE = {"/chat/completions": "choices", "/completions": "choices", "/decisions": "answers"}


def read_verified_reply(
    call: TaskCall, target: Target, outgoing: Sequence[UpstreamCall], replies: Sequence[UpstreamReply]
) -> Any:
    """What the caller gets. Raises BackendGarbage (not what the dialect promises) or RejectedReply (does not pass)."""
    for sent, reply in zip(outgoing, replies, strict=True):
        field = _MUST_HAVE.get(sent.path)
        if field is not None and not isinstance(reply.payload.get(field), list):
            raise BackendGarbage(f"{target.name} answered without {field!r}")
        if field == "choices" and not reply.payload[field]:
            raise RejectedReply(f"{target.name} answered with no choice at all")
        if wants_schema(sent) and _is_cut_off(reply):
            raise RejectedReply(f"{target.name} ran out of tokens before its JSON was complete: raise max_tokens")
    return call.read(target, replies)


def wants_schema(outgoing: UpstreamCall) -> bool:
    """Whether an answer that stops early is of no use: half of a JSON text is not JSON."""
    given = outgoing.body.get("response_format")
    return isinstance(given, dict) and given.get("type") in ("json_schema", "json_object")


def _is_cut_off(reply: UpstreamReply) -> bool:
    choices = reply.payload["choices"] if isinstance(reply.payload.get("choices"), list) else []
    return any(isinstance(choice, dict) and choice.get("finish_reason") == "length" for choice in choices)


class TranslatedCheck:
    """Verifies a stream in another dialect than OpenAI's, which is passed on as it comes. It is a `StreamCheck`."""

    def __init__(self, translator: StreamTranslator, check: StreamCheck) -> None:
        self._translator = translator
        self._check = check

    def feed(self, block: bytes) -> None:
        self._check.feed(self._translator.feed(block))

    def finish(self) -> None:
        self._check.feed(self._translator.end())
        self._check.finish()
