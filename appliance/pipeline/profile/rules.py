"""The profile by rules: cues in the head and the tail of the text. A fraction of a millisecond, whatever the length."""

from typing import Final

from appliance.core import LatencyClass, Profile, Request, Task
from appliance.pipeline.profile.cues import CONSTRAINING, CUES, DEMANDING, STEPPING
from appliance.pipeline.profile.language import guess_language
from appliance.pipeline.profile.sample import Sample, take_sample

DEFAULT_OUTPUT_TOKENS: Final = 256

_BASE: Final[dict[Task, float]] = {
    "classification": 0.1,
    "extraction": 0.15,
    "translation": 0.3,
    "summarisation": 0.3,
    "chat": 0.3,
    "tool_use": 0.3,
    "generation": 0.45,
    "code": 0.7,
    "reasoning": 0.7,
}
"""Where each task starts. Code and reasoning start at the default policy's mark for "complex": small local models get
most of it wrong, and a wrong answer costs more than a hosted one."""

_SIMPLE: Final[frozenset[Task]] = frozenset({"classification", "extraction"})

_PROBLEM_WORDS: Final = 250
_PROBLEM_NUMBERS: Final = 3
"""A short text with several numbers and a question at its end is a word problem."""


def profile(request: Request, *, prompt_tokens: int, output_tokens: int | None) -> Profile:
    """The profile of `request`. Token counts are the caller's estimates; None: the usual length of an answer."""
    sample = take_sample(request.text)
    task, why = _task(request, sample)
    complexity, because = _complexity(task, sample, prompt_tokens)
    return Profile(
        task=task,
        complexity=complexity,
        format=request.format,
        latency_class=_latency_class(request),
        language=guess_language(sample.text, sample.words),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens if output_tokens is not None else DEFAULT_OUTPUT_TOKENS,
        reasons=(f"{task}: {why}", f"complexity {complexity:.2f}: {because}"),
    )


def _latency_class(request: Request) -> LatencyClass:
    return "batch" if "inputs" in request.body or "texts" in request.body else "interactive"


def _task(request: Request, sample: Sample) -> tuple[Task, str]:
    if request.endpoint == "decisions" or request.format == "labels":
        return "classification", "the decisions endpoint"
    if request.endpoint == "extract":
        return "extraction", "the extract endpoint"
    if request.format == "tools":
        return "tool_use", "tools are given"
    for cue in CUES:
        if cue.is_in(sample):
            return cue.task, cue.name
    if request.format in ("json_schema", "json_object"):
        return "extraction", "structured output is asked for"
    if _is_word_problem(sample):
        return "reasoning", "a question about several numbers"
    return "chat", "no cue of another task"


def _is_word_problem(sample: Sample) -> bool:
    if len(sample.words) > _PROBLEM_WORDS or "?" not in sample.text[-80:]:
        return False
    return sum(any(map(str.isdigit, word)) for word in sample.words) >= _PROBLEM_NUMBERS


def _complexity(task: Task, sample: Sample, prompt_tokens: int) -> tuple[float, str]:
    """A sum of a start by task and of cues, held between 0 and 1."""
    scale = 0.25 if task in _SIMPLE else 1.0  # a long document hardly makes a label harder
    demanding = min(len(DEMANDING & sample.vocabulary), 3)
    constraints = min(sum(word in CONSTRAINING for word in sample.words), 6)
    steps = min(len(STEPPING & sample.vocabulary), 4)
    parts: list[tuple[float, str]] = [
        (_BASE[task], task),
        (demanding * 0.08 * scale, f"{demanding} demanding words"),
        (max(0, constraints - 1) * 0.03 * scale, f"{constraints} constraints"),
        (max(0, steps - 1) * 0.03 * scale, f"{steps} steps"),
        (min(prompt_tokens / 8000, 1.0) * 0.25 * scale, f"{prompt_tokens} prompt tokens"),
    ]
    total = round(min(sum(weight for weight, _ in parts), 1.0), 3)
    return total, ", ".join(name for weight, name in parts if weight >= 0.01)
