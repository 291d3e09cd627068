"""Providers that are known by name: what each does differently. The one place for such differences, and plain data.

A provider that is not here needs no code either: it is a row of the configuration with the address of its API, and
`leaves_out` and `refuses` for what its models do not take.

Sources: the providers' API references and the types of the official SDKs (anthropic 2.10, google-genai 3.3,
openai 3.51) as of November 2026.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, get_args
from urllib.parse import urlsplit

from appliance.core import Ability, Dialect, KeyHeader, ProviderQuirks

ProviderKind = Literal[
    "compatible",
    "openai",
    "azure",
    "anthropic",
    "gemini",
    "gemini_openai",
    "mistral",
    "groq",
    "together",
    "openrouter",
    "vllm",
    "appliance",
]

CHAT: Final[tuple[Ability, ...]] = ("chat", "completions", "json_schema", "logprobs", "tools")
"""What a model of an OpenAI-compatible server is taken to do where its row does not say."""

THINKING: Final = frozenset({"reasoning_content", "thinking_blocks", "extra_content"})
_SAMPLERS: Final = frozenset({"top_k", "min_p", "repetition_penalty", "thinking"})
"""Fields of other dialects and engines."""

KEY_HEADERS: Final = frozenset({"authorization", *get_args(KeyHeader)})

ANTHROPIC_VERSION: Final = "2026-10-21"
ANTHROPIC_SAMPLING: Final = frozenset({"temperature", "top_p", "top_k"})
"""Refused since that version, even with the value that is meant anyway."""

_ENDPOINTS: Final = (
    "/chat/completions", "/completions", "/messages", "/responses", "/embeddings", "/models", ":generateContent",
)  # fmt: skip
_CHATS_ONLY: Final[frozenset[Ability]] = frozenset({"completions", "embeddings", "decisions", "labels", "classify"})
"""What the other dialects are not used for."""

_VERSION: Final = re.compile(r"v\d\w*")


@dataclass(frozen=True, slots=True)
class ProviderPreset:
    dialect: Dialect = "openai"
    base_url: str | None = None
    """Where it is, so that a configuration need not say it."""
    host: str | None = None
    """The end of its host's name, by which it is known where the configuration does not name its kind."""
    abilities: tuple[Ability, ...] = CHAT
    wire: ProviderQuirks = field(default_factory=ProviderQuirks)
    cache_write: float = 1.0
    """What a prompt token costs that is put into its cache, in prompt tokens."""
    long_to_short: float = 1.0
    """How much more that costs where it is to be kept for an hour."""


KINDS: Final[Mapping[ProviderKind, ProviderPreset]] = {
    "compatible": ProviderPreset(),
    "openai": ProviderPreset(
        base_url="https://api.openai.com/v1",
        host="api.openai.com",
        wire=ProviderQuirks(
            "openai", token_limit="max_completion_tokens", refuses=_SAMPLERS, strips=THINKING, batches="openai"
        ),
        cache_write=1.25,
    ),
    "azure": ProviderPreset(
        host=".azure.com",
        wire=ProviderQuirks(
            "azure",
            "api-key",
            token_limit="max_completion_tokens",
            refuses=_SAMPLERS,
            strips=THINKING,
            batches="openai",
        ),
        cache_write=1.25,
    ),
    "anthropic": ProviderPreset(
        dialect="anthropic",
        base_url="https://api.anthropic.com/v1",
        host="api.anthropic.com",
        abilities=("chat", "json_schema", "tools"),
        wire=ProviderQuirks("anthropic", "x-api-key", batches="anthropic"),
        cache_write=1.25,
        long_to_short=1.6,
    ),
    "gemini": ProviderPreset(
        dialect="gemini",
        base_url="https://generativelanguage.googleapis.com/v1beta",
        host="generativelanguage.googleapis.com",
        abilities=("chat", "json_schema", "logprobs", "tools"),
        wire=ProviderQuirks("gemini", "x-goog-api-key"),
    ),
    "gemini_openai": ProviderPreset(
        base_url="https://generativelanguage.googleapis.com/v1beta/openai",
        abilities=("chat", "json_schema", "tools"),
        wire=ProviderQuirks(
            "gemini_openai",
            refuses=_SAMPLERS | {"logit_bias", "logprobs", "top_logprobs"},
            strips=frozenset({"reasoning_content", "thinking_blocks"}),
        ),
    ),
    "mistral": ProviderPreset(
        base_url="https://api.mistral.ai/v1",
        host="api.mistral.ai",
        abilities=("chat", "json_schema", "tools"),
        wire=ProviderQuirks(
            "mistral",
            token_limit="max_tokens",
            renames=(("seed", "random_seed"),),
            refuses=_SAMPLERS | {"logit_bias", "logprobs", "top_logprobs", "store", "service_tier", "verbosity"},
            leaves_out=frozenset({"user", "safety_identifier", "prompt_cache_key"}),
            strips=THINKING,
            # it tells its usage in the last chunk unasked, and takes no field that it does not know
            stream_usage=False,
            batches="mistral",
        ),
    ),
    "groq": ProviderPreset(
        base_url="https://api.groq.com/openai/v1",
        host="api.groq.com",
        abilities=("chat", "json_schema", "tools"),
        wire=ProviderQuirks(
            "groq",
            token_limit="max_completion_tokens",
            refuses=_SAMPLERS | {"logit_bias", "logprobs", "top_logprobs", "n"},
            strips=THINKING,
            batches="openai",
        ),
    ),
    "together": ProviderPreset(
        base_url="https://api.together.xyz/v1",
        host="api.together.xyz",
        wire=ProviderQuirks("together", token_limit="max_tokens", refuses=frozenset({"thinking"}), strips=THINKING),
    ),
    "openrouter": ProviderPreset(
        base_url="https://openrouter.ai/api/v1",
        host="openrouter.ai",
        wire=ProviderQuirks(
            "openrouter",
            token_limit="max_tokens",
            refuses=frozenset({"thinking"}),
            strips=frozenset({"thinking_blocks", "extra_content"}),
        ),
        # it passes its providers' prices on, the dearest of them
        cache_write=1.25,
        long_to_short=1.6,
    ),
    "vllm": ProviderPreset(wire=ProviderQuirks("vllm", strips=frozenset({"thinking_blocks", "extra_content"}))),
    # it passes on what its own targets are given
    "appliance": ProviderPreset(abilities=(*CHAT, "decisions"), wire=ProviderQuirks("appliance")),
}

assert set(KINDS) == set(get_args(ProviderKind))


def kind_at(host: str) -> ProviderKind:
    """The kind of provider that a host's name belongs to; `compatible` where it belongs to none that is known."""
    for name, kind in KINDS.items():
        if kind.host is not None and (host == kind.host or (kind.host[0] == "." and host.endswith(kind.host))):
            return name
    return "compatible"


def find_provider_kind(kind: ProviderKind | None, dialect: Dialect | None, base_url: str) -> ProviderKind:
    """What a provider is by what the configuration says of it. Raises ValueError where that contradicts itself."""
    if kind is not None:
        spoken = KINDS[kind].dialect
        if dialect is not None and dialect != spoken:
            raise ValueError(f"kind {kind!r} speaks the {spoken!r} dialect, not {dialect!r}: leave one of them out")
        return kind
    parts = urlsplit(base_url)
    found = kind_at(parts.hostname or "")
    if found == "gemini" and parts.path.endswith("/openai"):
        found = "gemini_openai"
    if dialect is None or KINDS[found].dialect == dialect:
        return found
    return "compatible" if dialect == "openai" else dialect


def check_address(kind: ProviderKind, base_url: str, api_version: str | None) -> None:
    """Raises ValueError, saying what the address should look like."""
    path = urlsplit(base_url).path
    ending = next((ending for ending in _ENDPOINTS if path.endswith(ending)), None)
    if ending is not None:
        raise ValueError(f"base_url ends with {ending!r}, which is added to it: leave that off")
    dialect = KINDS[kind].dialect
    if dialect != "openai" and not _VERSION.fullmatch(path.rpartition("/")[2]):
        example = KINDS[dialect].base_url
        raise ValueError(f"base_url {base_url!r} must end with the API's version, as {example!r} does")
    if kind == "azure" and not path.endswith(("/openai", "/openai/v1")):
        raise ValueError(f"base_url {base_url!r} must end with /openai/v1, or with /openai where deployments are named")
    if uses_deployments(kind, base_url) and api_version is None:
        raise ValueError("an address that ends with /openai needs api_version, for example 2024-10-21")
    if api_version is not None and kind not in ("azure", "anthropic"):
        raise ValueError(f"a provider of kind {kind!r} has no api_version: it is for azure and anthropic")


def check_abilities(kind: ProviderKind, model: str, abilities: Iterable[Ability]) -> None:
    """Raises ValueError where a model is said to do what its provider's API has no words for."""
    row = KINDS[kind]
    beyond = _CHATS_ONLY if row.dialect != "openai" else frozenset()
    if row.dialect == "anthropic" or "logprobs" in row.wire.refuses:
        beyond |= {"logprobs"}
    wrong = sorted(beyond & set(abilities))
    if wrong:
        raise ValueError(f"model {model!r} cannot do {', '.join(wrong)} by the API of {kind!r}: leave that out")


def check_batches(kind: ProviderKind, model: str, discount: float | None) -> None:
    """Raises ValueError where a model is said to be cheaper in batches that its provider's API does not have."""
    if discount is not None and KINDS[kind].wire.batches is None:
        known = ", ".join(name for name, row in KINDS.items() if row.wire.batches is not None)
        raise ValueError(
            f"model {model!r} has a batch_discount, and no batch API of {kind!r} is known: leave it out, or set kind "
            f"to one of {known} where the provider speaks that one's"
        )


def uses_deployments(kind: ProviderKind, base_url: str) -> bool:
    return kind == "azure" and urlsplit(base_url).path.endswith("/openai")
