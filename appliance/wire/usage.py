"""Token counts: what each dialect calls them, read into `Usage` and written from it.

A dialect describes its names once, as a `UsageShape`; there is one reader for all of them. `estimate_tokens` says how
many a text may have before a tokenizer has seen it: for admission and for sizing answers, not for money.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from appliance.core import Usage
from appliance.core.json_types import JsonObject
from appliance.wire.chat_ir import ChatUsage

CHARACTERS_PER_TOKEN = 4.0
"""English prose on byte-pair vocabularies of 30,000 to 200,000 entries; the usual rule of thumb."""

MESSAGE_TOKENS = 5
"""What a chat template adds around one message: role and turn markers."""

MAX_TOKEN_COUNT: Final = 1_000_000_000
"""More than this in one call is no count; no ledger could hold what it would cost."""


@dataclass(frozen=True, slots=True)
class UsageShape:
    """Where a dialect keeps its counts. Names are added up; `outer.inner` leads into an object."""

    prompt: tuple[str, ...]
    """The first must be there, else there is no usage to be trusted."""
    completion: tuple[str, ...]
    cached: str
    reasoning: str
    cache_write: str = ""
    cache_write_long: str = ""

    def read(self, fields: object) -> Usage | None:
        """None where there are no counts. A single count that makes no sense is 0."""
        if not isinstance(fields, Mapping) or _count(fields, self.prompt[0]) is None:
            return None
        return Usage(
            prompt_tokens=_sum(fields, self.prompt),
            completion_tokens=_sum(fields, self.completion),
            cached_tokens=_count(fields, self.cached) or 0,
            reasoning_tokens=_count(fields, self.reasoning) or 0,
            cache_write_tokens=_count(fields, self.cache_write) or 0,
            cache_write_long_tokens=_count(fields, self.cache_write_long) or 0,
        )


_CHAT: Final = UsageShape(
    prompt=("prompt_tokens",),
    completion=("completion_tokens",),
    cached="prompt_tokens_details.cached_tokens",
    reasoning="completion_tokens_details.reasoning_tokens",
    cache_write="prompt_tokens_details.cache_write_tokens",
)
_RESPONSES: Final = UsageShape(
    prompt=("input_tokens",),
    completion=("output_tokens",),
    cached="input_tokens_details.cached_tokens",
    reasoning="output_tokens_details.reasoning_tokens",
    cache_write="input_tokens_details.cache_write_tokens",
)


def read_usage(fields: object) -> Usage | None:
    """Token counts under either of OpenAI's two namings; None where there are none to be trusted."""
    shape = _CHAT if isinstance(fields, Mapping) and "prompt_tokens" in fields else _RESPONSES
    return shape.read(fields)


def read_payload_usage(payload: object) -> Usage:
    """What the payload of any endpoint says of its tokens; no tokens where it says nothing."""
    usage = read_usage(payload.get("usage")) if isinstance(payload, Mapping) else None
    return usage or Usage()


def write_usage(usage: Usage) -> ChatUsage:
    """The usage of a chat completion."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
        },
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def write_responses_usage(usage: Usage) -> JsonObject:
    """The usage of OpenAI's Responses, and of what is typed after it (decisions, batches)."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _sum(fields: JsonObject, names: tuple[str, ...]) -> int:
    return sum(_count(fields, name) or 0 for name in names)


def _count(fields: JsonObject, name: str) -> int | None:
    outer, _, inner = name.partition(".")
    value = fields.get(outer)
    if inner:
        value = value.get(inner) if isinstance(value, Mapping) else None
    return value if type(value) is int and 0 <= value <= MAX_TOKEN_COUNT else None


def estimate_tokens(text: str) -> int:
    """About how many tokens `text` has.

    Text outside ASCII counts half by its UTF-8 bytes, so that scripts which vocabularies cover badly do not look cheap.
    """
    if not text:
        return 0
    length = len(text) if text.isascii() else (len(text) + len(text.encode("utf-8", "replace"))) / 2
    return max(1, round(length / CHARACTERS_PER_TOKEN))
