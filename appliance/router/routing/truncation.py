"""A call made smaller: a shorter answer, a context without its oldest turns, or the last question alone. Pure.

The caller's body is never changed; what leaves for a target is a copy with fewer messages or a lower limit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from appliance.config import DegradeRule, RouteRule
from appliance.core import LateVerifiedCall, Target, TaskCall, TaskResult, UpstreamCall, UpstreamReply
from appliance.core.json_types import JsonObject
from appliance.tasks.chat import CHAT_ENDPOINTS
from appliance.wire.openai.inbound import join_message_text
from appliance.wire.usage import MESSAGE_TOKENS, estimate_tokens

_LIMITED_PATHS: Final = frozenset({"/chat/completions", "/completions"})
_LIMIT_FIELDS: Final = ("max_completion_tokens", "max_tokens")
_INSTRUCTING: Final = frozenset({"system", "developer"})

Message = JsonObject


@dataclass(frozen=True, slots=True)
class PromptTrim:
    """What a call is cut down to; None and False leave it as it is."""

    max_output_tokens: int | None = None
    keep_tokens: int | None = None
    last_only: bool = False

    def prompt_tokens(self, tokens: int) -> int:
        """Of a prompt of so many, before it is known what its messages are."""
        return tokens if self.keep_tokens is None else min(tokens, self.keep_tokens)

    def output_tokens(self, tokens: int) -> int:
        return tokens if self.max_output_tokens is None else min(tokens, self.max_output_tokens)


NO_TRIM: Final = PromptTrim()


def make_trim(rule: RouteRule) -> PromptTrim:
    keep = rule.prune_context.keep_tokens if rule.prune_context else None
    return PromptTrim(rule.max_output_tokens, keep)


def tighten_trim(shape: PromptTrim, step: DegradeRule) -> PromptTrim:
    """The route's own shape with a step's limits where those are tighter."""
    return PromptTrim(
        _tighter(shape.max_output_tokens, step.max_output_tokens),
        _tighter(shape.keep_tokens, step.keep_tokens),
        shape.last_only or step.step == "reduced_scope",
    )


def _tighter(one: int | None, other: int | None) -> int | None:
    return min((limit for limit in (one, other) if limit is not None), default=None)


@dataclass(frozen=True, slots=True)
class TrimmedCall:
    """A call, cut down on its way out. Its answer is read as the call itself would."""

    call: TaskCall
    shape: PromptTrim
    messages: tuple[Message, ...] | None
    """What is left of a chat; None: nothing was cut."""
    prompt_tokens: int
    output_tokens: int

    def streams(self, target: Target) -> bool:
        return self.call.streams(target)

    def verified_late(self) -> LateVerifiedCall | None:
        late = self.call.verified_late()
        return None if late is None else LateVerifiedCall(replace(self, call=late.call), late.check)

    def outgoing(self, target: Target) -> Sequence[UpstreamCall]:
        return [self._shaped(one) for one in self.call.outgoing(target)]

    def read(self, target: Target, replies: Sequence[UpstreamReply]) -> TaskResult:
        return self.call.read(target, replies)

    def _shaped(self, outgoing: UpstreamCall) -> UpstreamCall:
        if outgoing.path not in _LIMITED_PATHS:
            return outgoing
        body = outgoing.body
        if self.messages is not None and "messages" in body:
            body = {**body, "messages": list(self.messages)}
            outgoing = replace(outgoing, original=None)
        if self.shape.max_output_tokens is not None:
            body = {**body, **_limits(body, self.shape.max_output_tokens)}
        return outgoing if body is outgoing.body else replace(outgoing, body=body)


def trim_call(call: TaskCall, body: JsonObject, shape: PromptTrim) -> TaskCall:
    """`call`, whose chat messages `body` holds, cut down to `shape`; the call itself where nothing is to be cut."""
    if shape == NO_TRIM:
        return call
    while isinstance(call, TrimmedCall):
        call = call.call
    messages = body.get("messages")
    kept = _kept(messages, call.prompt_tokens, shape) if isinstance(messages, list) else None
    prompt_tokens = call.prompt_tokens if kept is None else _tokens(kept)
    choices = body.get("n")
    limit = None if shape.max_output_tokens is None else shape.max_output_tokens * (choices or 1)
    output_tokens = call.output_tokens if limit is None else min(call.output_tokens, limit)
    return TrimmedCall(call, shape, kept, prompt_tokens, output_tokens)


def _limits(body: JsonObject, limit: int) -> Mapping[str, int]:
    """The field that the caller used, lowered; else the one that every server understands."""
    given = [name for name in _LIMIT_FIELDS if isinstance(body.get(name), int)]
    return {name: min(body[name], limit) for name in given} or {"max_tokens": limit}


def _kept(messages: Sequence[Message], prompt_tokens: int, shape: PromptTrim) -> tuple[Message, ...] | None:
    """The messages that stay, in their order, or None where all do."""
    instructions = [message for message in messages if message.get("role") in _INSTRUCTING]
    turns = _turns([message for message in messages if message.get("role") not in _INSTRUCTING])
    if shape.last_only:
        turns = turns[-1:]
    elif shape.keep_tokens is None or prompt_tokens <= shape.keep_tokens:
        return None
    if shape.keep_tokens is not None:
        turns = _newest(turns, shape.keep_tokens - _tokens(instructions))
    stay = {id(message) for message in (*instructions, *(one for turn in turns for one in turn))}
    kept = tuple(message for message in messages if id(message) in stay)
    return None if len(kept) == len(messages) else kept


def _turns(messages: Sequence[Message]) -> list[list[Message]]:
    """A turn is a user's message and all that follows it: a tool's result never stays without the call it answers."""
    turns: list[list[Message]] = []
    for message in messages:
        if message.get("role") == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return turns


def _newest(turns: Sequence[list[Message]], tokens: int) -> list[list[Message]]:
    """The newest turns that fit; the last one always stays, or nothing would be asked."""
    kept: list[list[Message]] = []
    for turn in reversed(turns):
        tokens -= _tokens(turn)
        if kept and tokens < 0:
            break
        kept.insert(0, turn)
    return kept


def _tokens(messages: Sequence[Message]) -> int:
    return estimate_tokens(join_message_text(messages)) + MESSAGE_TOKENS * len(messages)


def make_static_answer(step: DegradeRule, request_id: str, endpoint: str, created: int) -> JsonObject:
    """The payload of a static step, as a target would give it."""
    is_chat = endpoint in CHAT_ENDPOINTS
    content: JsonObject = {"message": {"role": "assistant", "content": step.text}} if is_chat else {"text": step.text}
    return {
        "id": f"static-{request_id}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": "static",
        "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }
