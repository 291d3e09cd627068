"""The profile by rules: cues in the head and the tail of the text. A fraction of a millisecond, whatever the length."""

import math
from typing import Final

from appliance.core import Request, Task
from appliance.router.profile.estimate import BASE_COMPLEXITY, SIMPLE, SIMPLE_SCALE, ProfileEstimate, given_task
from appliance.router.profile.keywords import CONSTRAINING, CUES, DEMANDING, STEPPING, has_choices, is_word_problem
from appliance.router.profile.text_sample import TextSample

_LONGEST_TOKENS: Final = 8000
"""Beyond this a prompt is no more complex for being longer."""


def guess_profile(request: Request, sample: TextSample, *, prompt_tokens: int) -> ProfileEstimate:
    """`sample` is that of the request's text."""
    task, why = _task(request, sample)
    complexity, because = _complexity(task, sample, prompt_tokens)
    return ProfileEstimate(task, complexity, (f"{task}: {why}", f"complexity {complexity:.2f}: {because}"))


def _task(request: Request, sample: TextSample) -> tuple[Task, str]:
    given = given_task(request)
    if given is not None:
        return given
    for cue in CUES:
        if cue.is_in(sample):
            if cue.task == "reasoning" and has_choices(sample):
                return "chat", "a question of knowledge with choices"
            return cue.task, cue.name
    if request.format in ("json_schema", "json_object"):
        return "extraction", "structured output is asked for"
    if is_word_problem(sample) and not has_choices(sample):
        return "reasoning", "a question about several numbers"
    return "chat", "no cue of another task"


def _complexity(task: Task, sample: TextSample, prompt_tokens: int) -> tuple[float, str]:
    """A sum of a start by task and of cues, held between 0 and 1.

    Length counts by its logarithm and most: of all that was tried on open routing data it is the one sign of difficulty
    that holds on every set, and it holds among short prompts too.
    """
    scale = SIMPLE_SCALE if task in SIMPLE else 1.0
    demanding = min(len(DEMANDING & sample.vocabulary), 3)
    constraints = min(sum(word in CONSTRAINING for word in sample.words), 6)
    steps = min(len(STEPPING & sample.vocabulary), 4)
    length = min(math.log1p(prompt_tokens) / math.log1p(_LONGEST_TOKENS), 1.0)
    parts: list[tuple[float, str]] = [
        (BASE_COMPLEXITY[task], task),
        (demanding * 0.06 * scale, f"{demanding} demanding words"),
        (max(0, constraints - 1) * 0.01 * scale, f"{constraints} constraints"),
        (max(0, steps - 1) * 0.01 * scale, f"{steps} steps"),
        (length * 0.2 * scale, f"{prompt_tokens} prompt tokens"),
    ]
    total = round(min(sum(weight for weight, _ in parts), 1.0), 4)
    return total, ", ".join(name for weight, name in parts if weight >= 0.01)
