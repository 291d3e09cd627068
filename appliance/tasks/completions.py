"""Plain completions, the old OpenAI endpoint: prompt in, text out, the body verbatim."""

from collections.abc import Sequence
from dataclasses import dataclass

from appliance.core import Ability, ParsedRequest, Target, UpstreamCall, UpstreamReply
from appliance.core.json_types import JsonObject
from appliance.errors import RequestError, Unsupported
from appliance.tasks.chat import check_sampling
from appliance.tasks.reply_result import ReplyResult
from appliance.wire.chat_ir import MAX_TOP_LOGPROBS
from appliance.wire.chat_replies import check_choices
from appliance.wire.strict_fields import missing, read_bool, read_int, read_list, read_model, wrong
from appliance.wire.usage import estimate_tokens

DEFAULT_OUTPUT_TOKENS = 16
"""OpenAI's default for this endpoint."""
MAX_PROMPTS = 256


@dataclass(frozen=True, slots=True)
class CompletionCall:
    body: JsonObject
    stream: bool
    prompt_tokens: int
    output_tokens: int

    def streams(self, target: Target) -> bool:
        return self.stream

    def verified_late(self) -> None:
        return None

    def outgoing(self, target: Target) -> Sequence[UpstreamCall]:
        return (UpstreamCall("/completions", self.body),)

    def read(self, target: Target, replies: Sequence[UpstreamReply]) -> ReplyResult:
        """The target's payload, untouched. Raises BackendGarbage."""
        check_choices(replies[0].payload, "text")
        return ReplyResult(replies[0].payload, replies[0].usage)


def read_completion_request(body: JsonObject) -> tuple[ParsedRequest, Sequence[CompletionCall]]:
    """Check a completions body. Raises RequestError naming field, value and remedy."""
    prompts = _read_prompts(body)
    check_sampling(body)
    stream = read_bool(body, "stream")
    output_tokens = read_int(body, "max_tokens", 1)
    needs: set[Ability] = {"completions"}
    if read_int(body, "logprobs", 0, MAX_TOP_LOGPROBS) is not None:
        needs.add("logprobs")
    text = "\n".join(prompts)
    asked = ParsedRequest(
        endpoint="completions",
        model=read_model(body),
        body=body,
        text=text,
        stream=stream,
        needs=frozenset(needs),
        output_tokens=output_tokens,
    )
    choices = len(prompts) * (body.get("n") or 1)
    call = CompletionCall(body, stream, estimate_tokens(text), (output_tokens or DEFAULT_OUTPUT_TOKENS) * choices)
    return asked, (call,)


def _read_prompts(body: JsonObject) -> Sequence[str]:
    prompt = body.get("prompt")
    if prompt is None:
        raise missing("prompt", "it must be a string or a list of strings")
    if isinstance(prompt, str):
        return (prompt,)
    if prompt == []:
        raise RequestError("prompt is an empty list: give at least one prompt", param="prompt")
    prompts = read_list(prompt, "prompt", 1, MAX_PROMPTS, "prompts") if isinstance(prompt, list) else [prompt]
    if isinstance(prompt, list) and isinstance(prompt[0], int | list):
        raise Unsupported(
            "prompt is a list of token ids: send text (ids mean something else to every model, and which model "
            "answers is decided here)",
            param="prompt",
        )
    for index, item in enumerate(prompts):
        if not isinstance(item, str):
            raise wrong(f"prompt[{index}]" if isinstance(prompt, list) else "prompt", item, "it must be a string")
    return prompts
