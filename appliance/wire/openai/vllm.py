"""What is particular to vLLM behind the OpenAI dialect. Pure.

It takes any field of a request and does nothing about those it does not know: `guided_choice` (an older name) or a
misspelt one gives free text with status 200. So fields are checked here against those it has. And a choice that was cut
off by `max_tokens` is the beginning of a label with status 200: so finish reasons are checked too.
"""

from collections.abc import Mapping
from typing import Final

from appliance.core import Target
from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.errors import RejectedReply, Unsupported
from appliance.wire.chat_fields import HINTS, is_harmless

_SAMPLING: Final = frozenset(
    [
        "add_special_tokens",
        "allowed_token_ids",
        "bad_words",
        "cache_salt",
        "echo",
        "frequency_penalty",
        "ignore_eos",
        "include_stop_str_in_output",
        "length_penalty",
        "logit_bias",
        "logprob_token_ids",
        "logprobs",
        "max_tokens",
        "min_p",
        "min_tokens",
        "model",
        "n",
        "presence_penalty",
        "priority",
        "prompt_logprobs",
        "repetition_detection",
        "repetition_penalty",
        "request_id",
        "response_format",
        "return_token_ids",
        "return_token_offsets",
        "return_tokens_as_token_ids",
        "seed",
        "session_id",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stop",
        "stop_token_ids",
        "stream",
        "stream_options",
        "structured_outputs",
        "temperature",
        "thinking_token_budget",
        "top_k",
        "top_p",
        "truncate_prompt_tokens",
        "truncation_side",
        "use_beam_search",
        "user",
        "vllm_xargs",
    ]
)
_FIELDS: Final[Mapping[str, frozenset[str]]] = {
    "/chat/completions": _SAMPLING
    | frozenset(
        [
            "add_generation_prompt",
            "chat_template_kwargs",
            "continue_final_message",
            "documents",
            "include_reasoning",
            "max_completion_tokens",
            "messages",
            "mm_processor_kwargs",
            "parallel_tool_calls",
            "reasoning_effort",
            "tool_choice",
            "tools",
            "top_logprobs",
        ]
    ),
    "/completions": _SAMPLING | frozenset({"prompt", "suffix"}),
}
"""As 0.32 has them; those that reach beyond the request (templates, files, transfers of caches) are left out."""
_RECORDED: Final = frozenset({"metadata", "store", "service_tier", "safety_identifier", "verbosity", "modalities"})
"""For a provider's own records and tiers: they change no answer here."""
_NOW_CALLED: Final[Mapping[str, str]] = {
    "guided_choice": "structured_outputs.choice",
    "guided_json": "structured_outputs.json",
    "guided_regex": "structured_outputs.regex",
    "guided_grammar": "structured_outputs.grammar",
}


def is_vllm(target: Target) -> bool:
    """Whether it is one of this node's own."""
    return target.provider is None and "token_logprobs" in target.abilities


def check_fields(target: Target, path: str, body: JsonObject) -> MutableJsonObject:
    """`body` with no field that vLLM would ignore. Raises Unsupported naming the first one that means something."""
    known = _FIELDS.get(path)
    if known is None:
        return dict(body)
    for name, value in body.items():
        if name in known or name in HINTS or name in _RECORDED or value is None or is_harmless(name, value):
            continue
        remedy = f"it is called {_NOW_CALLED[name]} now" if name in _NOW_CALLED else "leave it out"
        raise Unsupported(f"{target.name} does not know {name!r} and would ignore it: {remedy}", param=name)
    return {name: value for name, value in body.items() if name in known}


def check_choices(body: JsonObject, payload: JsonObject) -> None:
    """Raises RejectedReply where one of several texts was asked for and the reply is none of them."""
    wanted = body.get("structured_outputs")
    choices = wanted.get("choice") if isinstance(wanted, Mapping) else None
    if not isinstance(choices, list) or not isinstance(payload.get("choices"), list):
        return
    for choice in payload["choices"]:
        text = choice.get("text", (choice.get("message") or {}).get("content")) if isinstance(choice, Mapping) else None
        if text not in choices:
            cut = " and was cut off: raise max_tokens" if choice.get("finish_reason") == "length" else ""
            raise RejectedReply(f"the reply {text!r:.60} is none of the {len(choices)} choices{cut}")
