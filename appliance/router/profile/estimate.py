"""What a profiler says of a request, and what is known before any profiler is asked."""

from dataclasses import dataclass
from typing import Final

from appliance.core import Request, Task

BASE_COMPLEXITY: Final[dict[Task, float]] = {
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

SIMPLE: Final[frozenset[Task]] = frozenset({"classification", "extraction"})
"""A long document hardly makes a label harder."""

SIMPLE_SCALE: Final = 0.25


@dataclass(frozen=True, slots=True)
class ProfileEstimate:
    """`complexity` as in Profile. `reasons`: one for the task, one for the complexity."""

    task: Task
    complexity: float
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LlmProfile:
    """What a local model said of a text: a task, how sure of it, and how hard from 0 to 1."""

    target: str
    task: Task
    confidence: float
    difficulty: float


def given_task(request: Request) -> tuple[Task, str] | None:
    """The task where endpoint or format say it, and why; no text overrules them."""
    if request.endpoint == "decisions" or request.format == "labels":
        return "classification", "the decisions endpoint"
    if request.endpoint == "extract":
        return "extraction", "the extract endpoint"
    if request.format == "tools":
        return "tool_use", "tools are given"
    return None
