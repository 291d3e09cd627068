"""The options of `vllm serve`, version by version. Pure.

Checked against the options that 0.32.0 and 0.33.0 accept. An unknown one ends the program with code 2, so older
versions get only options that have long been there. Negations are written `--no-enable-...`: both versions take those.
"""

import re
from collections.abc import Mapping
from typing import Final

Version = tuple[int, int, int]
Settings = tuple[tuple[str, str], ...]

OLDEST: Final[Version] = (0, 32, 0)
"""The oldest version that all of this was tried with."""

_SINCE: Final[Mapping[str, Version]] = {
    "--max-num-queued-reqs": (0, 32, 0),
    "--max-num-queued-tokens": (0, 32, 0),
    "--shutdown-timeout": (0, 32, 0),
    "--enable-prompt-tokens-details": (0, 6, 0),
    "--stream-interval": (0, 10, 0),
    "--kv-cache-memory-bytes": (0, 11, 0),
}
"""Options that older versions do not know. Those of the first rows may be older than they are said to be here."""

GONE: Final[frozenset[str]] = frozenset(
    {
        "--task",
        "--device",
        "--swap-space",
        "--guided-decoding-backend",
        "--num-scheduler-steps",
        "--use-v2-block-manager",
        "--enable-reasoning",
        "--max-seq-len-to-capture",
        "--disable-frontend-multiprocessing",
        "--kv-cache-memory",
    }
)
"""Options that 0.32 and 0.33 refuse."""
_REFUSED_BELOW: Final[Mapping[str, Version]] = {"--disable-log-requests": (0, 33, 0)}

# Patterns over "family name", first match counts: (pattern, tool-call parser, reasoning parser).
_PARSERS: Final = (
    (r"gpt-?oss", "openai", "openai_gptoss"),
    (r"qwen3-coder|qwen3\.?5-coder", "qwen3_coder", ""),
    (r"qwen3\.5|qwen3\.6", "qwen3_coder", "qwen3"),
    (r"qwen3", "hermes", "qwen3"),
    (r"qwen2|smollm|hermes", "hermes", ""),
    (r"llama-?4", "llama4_pythonic", ""),
    (r"llama-?3", "llama3_json", ""),
    (r"ministral|mistral|devstral|magistral", "mistral", ""),
    (r"functiongemma", "functiongemma", ""),
    (r"gemma-?4", "gemma4", "gemma4"),
    (r"phi-?4-mini", "phi4_mini_json", ""),
    (r"granite-?4", "granite4", ""),
    (r"granite", "granite", ""),
    (r"deepseek-?v3\.1", "deepseek_v31", "deepseek_v3"),
    (r"deepseek-?v3", "deepseek_v3", ""),
    (r"deepseek-?r1", "", "deepseek_r1"),
    (r"glm-?4\.[67]", "glm47", "glm47"),
    (r"glm-?4\.5", "glm45", "glm45"),
    (r"lfm2", "lfm2", ""),
    (r"olmo-?3", "olmo3", "olmo3"),
    (r"kimi-?k2", "kimi_k2", "kimi_k2"),
)


def read_version(text: str) -> Version:
    """`0.32.0+cpu` -> (0, 32, 0). Raises ValueError."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    if found is None:
        raise ValueError(f"{text!r} is no version")
    return int(found[1]), int(found[2]), int(found[3] or 0)


def find_parsers(family: str, name: str) -> Settings:
    """The options that make vLLM read a model's tool calls and thoughts; empty if none is known for it."""
    words = f"{family} {name}".lower()
    for pattern, tools, reasoning in _PARSERS:
        if re.search(pattern, words):
            found: list[tuple[str, str]] = []
            if tools:
                found += [("--enable-auto-tool-choice", ""), ("--tool-call-parser", tools)]
            if reasoning:
                found.append(("--reasoning-parser", reasoning))
            return tuple(found)
    return ()


def filter_known_options(settings: Mapping[str, str], version: Version) -> dict[str, str]:
    """Those of `settings` that `version` accepts."""
    return {name: value for name, value in settings.items() if _is_known(name, version)}


def _is_known(name: str, version: Version) -> bool:
    if name in GONE or version < _REFUSED_BELOW.get(name, (0, 0, 0)):
        return False
    return version >= _SINCE.get(name, (0, 0, 0))


def format_options(settings: Mapping[str, str]) -> list[str]:
    """As a command line: an empty value stands for an option that takes none."""
    return [word for name, value in settings.items() for word in (name, value) if word]
