"""Whether replies are an answer at all, before the call reads them, and whether a result is sure enough. Pure."""

from collections.abc import Sequence

from appliance.config import EscalationRule
from appliance.core import StreamCheck, Target, TaskCall, TaskResult, UpstreamCall, UpstreamReply
from appliance.errors import BackendGarbage, RejectedReply
from appliance.wire.streams import StreamTranslator

_MUST_HAVE = {"/chat/completions": "choices", "/completions": "choices", "/decisions": "answers"}


def read_verified_reply(
    call: TaskCall, target: Target, outgoing: Sequence[UpstreamCall], replies: Sequence[UpstreamReply]
) -> TaskResult:
    """The call's result. Raises BackendGarbage (not what the dialect promises) or RejectedReply (does not pass)."""
    for sent, reply in zip(outgoing, replies, strict=True):
        field = _MUST_HAVE.get(sent.path)
        if field is not None and not isinstance(reply.payload.get(field), list):
            raise BackendGarbage(f"{target.name} answered without {field!r}")
        if field == "choices" and not reply.payload[field]:
            raise RejectedReply(f"{target.name} answered with no choice at all")
        if wants_schema(sent) and _is_cut_off(reply):
            raise RejectedReply(f"{target.name} ran out of tokens before its JSON was complete: raise max_tokens")
    return call.read(target, replies)


def find_doubt(result: TaskResult, rule: EscalationRule) -> str | None:
    """Why `result` counts as unsure, or None. An answer without a confidence is never unsure."""
    confidence, mass = result.confidence, result.label_mass
    if confidence is not None and confidence < rule.below_confidence:
        return f"confidence {confidence:.2f} is below {rule.below_confidence:.2f}"
    if rule.below_label_mass is not None and mass is not None and mass < rule.below_label_mass:
        return f"label mass {mass:.2f} is below {rule.below_label_mass:.2f}"
    return None


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
