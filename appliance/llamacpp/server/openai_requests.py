"""OpenAI's requests to what the engine is asked: defaults, limits, and refusals of what it cannot do."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

from appliance.core.json_types import JsonObject, JsonSchema, MutableJsonObject
from appliance.errors import ContextTooLong, RequestError, UnknownModel, Unsupported
from appliance.llamacpp.chat.prompts import PromptBuilder
from appliance.llamacpp.chat.reply_format import ReplyFormat
from appliance.llamacpp.decode.constraints import JSON_OBJECT
from appliance.llamacpp.engine_protocol import Sampling
from appliance.llamacpp.server.generation import GenerationRequest
from appliance.llamacpp.server.request_models import ChatIn, CompletionIn, ResponseFormatIn, SampledIn
from appliance.llamacpp.tools.formats import THINKING
from appliance.llamacpp.tools.grammar import ReplyGrammarSpec
from appliance.llamacpp.tools.offered import OfferedTools, check_offered_tools
from appliance.llamacpp.tools.parser import ReplySyntaxes

DEFAULT_CHAT_TOKENS = 1_024
"""A chat reply's length where the caller sets none: OpenAI gives the rest of the context, but a small model that does
not find its end would hold a sequence for minutes."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's own default for plain completions."""
MAX_SEQUENCES_PER_CALL = 256

_SWITCH: Final = "enable_thinking"
_OWN_VARIABLES: Final = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})


class ModelLimits(Protocol):
    """What is needed of `Model` to judge a request."""

    vocabulary_size: int

    @property
    def sequence_context_tokens(self) -> int:
        """The longest one sequence may become, prompt and reply together."""


def check_model(asked: str | None, served: str) -> None:
    if asked is not None and asked != served:
        raise UnknownModel(f"model: {asked!r} is not served here; ask for {served!r} or leave model out", param="model")


def build_chat_request(call: ChatIn, prompts: PromptBuilder, limits: ModelLimits) -> GenerationRequest:
    """Raises RequestError, Unsupported or ContextTooLong. Tokenises, so a long call belongs in a thread."""
    if call.top_logprobs is not None and not call.logprobs:
        raise RequestError(
            "top_logprobs: needs logprobs to be true; set it or leave top_logprobs out", param="top_logprobs"
        )
    offered = check_offered_tools(call.tools, call.tool_choice, call.parallel_tool_calls)
    if offered is not None:
        check_tools_supported(prompts)
    text = prompts.render(
        call.messages, offered.tools if offered is not None else None, build_template_variables(call, prompts)
    )
    asked = call.max_completion_tokens or call.max_tokens
    logprobs = (call.top_logprobs or 0) if call.logprobs else None
    request = _build_request(
        call, [prompts.tokenize_raw(text)], asked or DEFAULT_CHAT_TOKENS, logprobs, limits, "messages"
    )
    thinks = call.reasoning_effort not in (None, "none")
    return with_reply_format(request, prompts.reply_format, offered, text, thinks=thinks)


def build_completion_request(call: CompletionIn, prompts: PromptBuilder, limits: ModelLimits) -> GenerationRequest:
    """Raises RequestError, Unsupported or ContextTooLong. Tokenises, so a long call belongs in a thread."""
    if call.echo:
        raise Unsupported("echo: true is not supported; put prompt and reply together yourself", param="echo")
    if call.suffix:
        raise Unsupported("suffix: filling in the middle is not supported; leave it out", param="suffix")
    if call.best_of is not None and call.best_of != (call.n or 1):
        raise Unsupported(f"best_of: {call.best_of} is not supported unless it equals n; leave it out", param="best_of")
    given = _prompt_tokens(call.prompt, prompts, limits.vocabulary_size)
    return _build_request(call, given, call.max_tokens or DEFAULT_COMPLETION_TOKENS, call.logprobs, limits, "prompt")


def join_cache_salt(cache_salt: str | None, prompt_cache_key: str | None) -> str:
    """One salt of both: prefixes are shared only where both are equal. NUL stands in neither."""
    return f"{cache_salt or ''}\0{prompt_cache_key or ''}" if cache_salt or prompt_cache_key else ""


def check_length(tokens: int, limits: ModelLimits, param: str) -> int:
    """How many tokens may follow a prompt. Raises ContextTooLong with both numbers where none may."""
    left = limits.sequence_context_tokens - tokens
    if left < 1:
        raise ContextTooLong(
            f"{param}: {tokens} tokens do not fit the context of {limits.sequence_context_tokens} tokens with room for "
            "a reply; shorten it",
            param=param,
        )
    return left


def _build_request(
    call: SampledIn,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    logprobs: int | None,
    limits: ModelLimits,
    param: str,
) -> GenerationRequest:
    n = call.n or 1
    if len(prompts) * n > MAX_SEQUENCES_PER_CALL:
        raise RequestError(
            f"n: {n} choices for {len(prompts)} prompts are more than {MAX_SEQUENCES_PER_CALL} replies in one call; "
            "send several calls",
            param="n",
        )
    stops = [call.stop] if isinstance(call.stop, str) else call.stop or []
    # A reply that would not fit is cut at the context's end and says so by finish_reason "length".
    return GenerationRequest(
        prompts=prompts,
        n=n,
        max_tokens=[min(tokens, check_length(len(prompt), limits, param)) for prompt in prompts],
        sampling=_sampling(call, limits.vocabulary_size),
        stops=[stop for stop in stops if stop],
        logprobs=logprobs,
        schema=_schema(call.response_format),
        ignore_eos=call.ignore_eos,
        priority=call.priority,
        cache_salt=join_cache_salt(call.cache_salt, call.prompt_cache_key),
        streamed=bool(call.stream),
    )


def _sampling(call: SampledIn, vocabulary_size: int) -> Sampling:
    repetition = call.repetition_penalty if call.repetition_penalty is not None else call.repeat_penalty
    return Sampling(
        temperature=_or(call.temperature, 1.0),
        top_p=_or(call.top_p, 1.0),
        top_k=max(0, call.top_k or 0),
        min_p=_or(call.min_p, 0.0),
        seed=call.seed,
        presence_penalty=_or(call.presence_penalty, 0.0),
        frequency_penalty=_or(call.frequency_penalty, 0.0),
        repetition_penalty=_or(repetition, 1.0),
        logit_bias=_bias(call.logit_bias or {}, vocabulary_size),
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _bias(given: Mapping[str, float], vocabulary_size: int) -> dict[int, float]:
    bias = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and int(key[:12]) < vocabulary_size):
            raise RequestError(
                f"logit_bias: {key!r:.40} is no token id; give numbers from 0 to {vocabulary_size - 1}",
                param="logit_bias",
            )
        bias[int(key)] = value
    return bias


def _schema(wanted: ResponseFormatIn | None) -> JsonSchema | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return JSON_OBJECT
    if wanted.json_schema is None:
        field = "response_format.json_schema"
        raise RequestError(f"{field}: is missing; give it as {{name, schema}}", param=field)
    return wanted.json_schema.json_schema


def _prompt_tokens(
    given: str | list[str] | list[int] | list[list[int]], prompts: PromptBuilder, vocabulary_size: int
) -> list[list[int]]:
    several: list[Any] = given if isinstance(given, list) and not _is_ids(given) else [given]
    if not several:
        raise RequestError("prompt: is an empty list; give at least one prompt", param="prompt")
    tokens = [prompts.tokenize_raw(one) if isinstance(one, str) else list(one) for one in several]
    for position, ids in enumerate(tokens):
        place = f"prompt[{position}]" if len(tokens) > 1 else "prompt"
        if not ids:
            raise RequestError(
                f"{place}: is empty and this model has no token to begin with; write something", param=place
            )
        wrong = next((token for token in ids if not 0 <= token < vocabulary_size), None)
        if wrong is not None:
            raise RequestError(f"{place}: {wrong} is no token id; ids go from 0 to {vocabulary_size - 1}", param=place)
    return tokens


def _is_ids(given: Sequence[Any]) -> bool:
    return bool(given) and isinstance(given[0], int)


def check_tools_supported(prompts: PromptBuilder) -> None:
    """Raises Unsupported where the model was not taught to call tools in a way that can be read."""
    if prompts.reply_format.tools is not None:
        return
    template = prompts.template
    if template is not None and template.abilities.tools:
        why = "this model writes tool calls in a form that is not known here"
    else:
        why = "this model's chat template has no place for tools"
    raise Unsupported(f"tools: {why}; leave them out, or ask a model with the ability tools", param="tools")


def build_template_variables(call: ChatIn, prompts: PromptBuilder) -> JsonObject:
    """Variables of the template besides the messages. Raises Unsupported for one that it does not read."""
    variables: MutableJsonObject = {}
    effort, template, style = call.reasoning_effort, prompts.template, prompts.reply_format
    if effort is not None and effort != "none" and style.reasoning is None:
        raise Unsupported(
            f"reasoning_effort: {effort!r}: this model does not reason before it answers; leave it out, or ask a model "
            "with the ability reasoning",
            param="reasoning_effort",
        )
    if effort is not None and template is not None:
        if template.abilities.effort:
            variables["reasoning_effort"] = effort
        if template.abilities.switch:
            variables[_SWITCH] = effort != "none"
    elif wants_json(call) and template is not None and template.abilities.switch:
        # Thinking first may take all of a reply's length; reasoning_effort asks for it.
        variables[_SWITCH] = False
    for name, value in (call.chat_template_kwargs or {}).items():
        known = template is not None and name not in _OWN_VARIABLES and template.knows(name)
        if not known and not (name == _SWITCH and value is False and style.reasoning is None):
            place = f"chat_template_kwargs.{name}"
            raise Unsupported(f"{place[:120]}: this model's chat template does not know it; leave it out", param=place)
        variables[name] = value
    return variables


def wants_json(call: ChatIn) -> bool:
    return call.response_format is not None and call.response_format.type != "text"


def with_reply_format(
    request: GenerationRequest, style: ReplyFormat, offered: OfferedTools | None, prompt: str, *, thinks: bool
) -> GenerationRequest:
    """The call with what its replies are held to and read by; unchanged where they can be text alone.

    `thinks`: the caller wants thoughts, also before JSON.
    """
    if offered is None and style.reasoning is None:
        return request
    opened = _thinking_open(style, prompt)
    tools = style.tools if offered is not None else None
    grammar = None
    if offered is not None or (request.schema is not None and (opened or thinks or style.reasoning == "harmony")):
        grammar = ReplyGrammarSpec(offered, tools, request.schema, style.reasoning, opened, style.specials)
    syntaxes = ReplySyntaxes(
        tools=tools,
        reasoning=style.reasoning,
        thinking_open=opened,
        schemas=offered.schemas if offered is not None else {},
        shown=style.shown,
    )
    return replace(request, grammar=grammar, syntaxes=syntaxes)


def _thinking_open(style: ReplyFormat, prompt: str) -> bool:
    """Some templates write the opening marker themselves."""
    if style.reasoning is None or style.reasoning == "harmony":
        return False
    return prompt.rstrip().endswith(THINKING[style.reasoning][0])
