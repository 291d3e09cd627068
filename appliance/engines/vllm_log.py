"""What vLLM writes while it starts and when it dies, read back. Pure.

One start writes from three kinds of process, each line with its origin: `(APIServer pid=N)`, `(EngineCore pid=N)`,
`(Worker pid=N)`. Where the engine's part fails the front end only says "Engine core initialization failed. See root
cause above": the cause is an ERROR line of a worker or of the engine core before it.
"""

import re
from collections.abc import Sequence
from typing import Final

_ERROR_LINE: Final = re.compile(r"^\((?P<who>\w+)[^)]*\) ERROR [^\]]*\] ?(?P<text>.*)$")
_EXCEPTION: Final = re.compile(r"^(?:[\w.]+\.)?(?P<name>[A-Z]\w*(?:Error|Exception|Interrupt|NotFound)): (?P<said>.+)$")
_PREFIX: Final = re.compile(r"^\(\w+[^)]*\) (?:(?:INFO|WARNING|ERROR|DEBUG) [^\]]*\] ?)?")
_USAGE: Final = re.compile(r"^(?:vllm(?: serve)?|\S+): error: (?P<said>.+)$")
_SAYS_NOTHING: Final = ("Engine core initialization failed", "See root cause above", "cannot schedule new futures")
_MOST_CHARACTERS: Final = 400

_SHORT_OF_MEMORY: Final = re.compile(
    r"OutOfMemoryError|out of memory|No available memory for the cache blocks|larger than the available KV cache memory"
    r"|is less than desired GPU memory utilization|can't allocate memory|MemoryError|Decrease --kv-cache-memory-bytes"
    r"|is less than requested memory for kv|Available memory on node|cannot allocate memory",
    re.IGNORECASE,
)
_FITTING_LENGTH: Final = re.compile(r"estimated maximum model length is (\d+)")

# Newest stage last; the last line that matches any of them tells.
_STAGES: Final = (
    (re.compile(r"non-default args"), "reading its arguments"),
    (re.compile(r"Resolved architecture: (\w+)"), "reading the model's configuration ({0})"),
    (re.compile(r"Initializing a V1 LLM engine"), "starting its engine process"),
    (re.compile(r"Starting to load model"), "opening the weights"),
    (
        re.compile(r"Loading safetensors checkpoint shards: +(\d+)% Completed \| (\d+)/(\d+)"),
        "loading weights: {0} % ({1} of {2} files)",
    ),
    (re.compile(r"Loading weights took ([\d.]+) s"), "weights loaded in {0} s"),
    (re.compile(r"Model loading took ([\d.]+) GiB"), "weights loaded ({0} GiB)"),
    (re.compile(r"[Cc]ompiling (?:a graph|model)|Dynamo bytecode transform|torch\.compile"), "compiling"),
    (re.compile(r"Available KV cache memory: ([\d.]+) GiB"), "memory measured: {0} GiB for the KV cache"),
    (re.compile(r"KV cache size: ([\d,]+) tokens"), "KV cache of {0} tokens made"),
    (re.compile(r"Capturing CUDA graphs[^:]*: +(\d+)%"), "capturing CUDA graphs: {0} %"),
    (re.compile(r"Graph capturing finished"), "CUDA graphs captured"),
    (re.compile(r"init engine .*took ([\d.]+) s"), "engine initialised in {0} s"),
    (re.compile(r"Starting vLLM server"), "opening its socket"),
)
_NOISE: Final = re.compile(r"torch\.compile, CUDAGraphs|disabling torch\.compile")


def parse_progress(lines: Sequence[str]) -> str:
    """What the start has come to, in words; empty before the first sign."""
    for line in reversed(lines):
        if _NOISE.search(line):
            continue
        for pattern, text in reversed(_STAGES):
            found = pattern.search(line)
            if found:
                return text.format(*found.groups())
    return ""


def find_crash_reason(lines: Sequence[str]) -> str:
    """Why it ended: the root cause where there is one, else the last thing that was written."""
    said = {"Worker": "", "EngineCore": "", "other": ""}
    for line in lines:
        who, text = _origin(line)
        found = _EXCEPTION.match(text)
        if found and not any(words in text for words in _SAYS_NOTHING):
            said[who] = said[who] or f"{found['name']}: {found['said']}"
        usage = _USAGE.match(text)
        if usage:
            return usage["said"][:_MOST_CHARACTERS]
    for who in ("Worker", "EngineCore", "other"):
        if said[who]:
            return said[who][:_MOST_CHARACTERS]
    return _PREFIX.sub("", lines[-1])[:_MOST_CHARACTERS] if lines else ""


def is_short_of_memory(words: str) -> bool:
    return _SHORT_OF_MEMORY.search(words) is not None


def parse_fitting_length_tokens(words: str) -> int | None:
    """The longest sequence that its KV cache would hold, where it says so."""
    found = _FITTING_LENGTH.search(words)
    return int(found[1]) if found else None


def _origin(line: str) -> tuple[str, str]:
    """Who wrote a line, and what."""
    found = _ERROR_LINE.match(line)
    if found is None:
        return "other", _PREFIX.sub("", line)
    who = found["who"]
    kind = "Worker" if "Worker" in who else "EngineCore" if who.startswith("EngineCore") else "other"
    return kind, found["text"].strip()
