"""The profile by a local model: what it is asked, how its answer is read, and what becomes of it. Pure.

Two questions of the decisions API in one call: which task, and how hard. The model sees the head and the tail of the
text; its instructions come first, so an engine computes them once and keeps them.
"""

from typing import Final

from appliance.core import Target, Task, UpstreamCall, UpstreamReply
from appliance.errors import ApplianceError, BackendGarbage
from appliance.router.profile.estimate import BASE_COMPLEXITY, SIMPLE, SIMPLE_SCALE, LlmProfile, ProfileEstimate
from appliance.tasks.decisions import label_prompts
from appliance.tasks.decisions.inputs import Input
from appliance.tasks.decisions.questions import Option, Question
from appliance.wire.usage import MESSAGE_TOKENS, estimate_tokens

HEAD_CHARACTERS: Final = 500
TAIL_CHARACTERS: Final = 200
"""What a small model on a CPU reads twice (once for each question) well within its time."""

SURE: Final = 0.4
"""Less sure of the task than this, a model is not believed: an even guess among eight is 0.125."""

_REACH: Final = 0.6
"""How far difficulty moves complexity from where the task starts: half of this, down or up."""

_MEANINGS: Final[dict[Task, str]] = {
    "classification": "choose a label for a text from a given set",
    "extraction": "find fields, names or a passage in a given text",
    "summarisation": "make a given text shorter",
    "translation": "put a text into another language",
    "code": "write, explain or repair a program",
    "reasoning": "mathematics, logic, a problem to be worked out",
    "generation": "write something new: a story, a mail, ideas",
    "chat": "talk, or answer a question of knowledge",
}

_TASK: Final = Question(
    "choice",
    "task",
    "What does the user want from an assistant?",
    tuple(Option(task, meaning) for task, meaning in _MEANINGS.items()),
)
_DIFFICULTY: Final = Question(
    "score",
    "difficulty",
    "How hard is it to answer this well?",
    tuple(Option(level) for level in ("trivial", "easy", "moderate", "hard", "expert")),
)
_QUESTIONS: Final = (_TASK, _DIFFICULTY)
SEQUENCES: Final = len(_QUESTIONS)


def take_excerpt(text: str) -> str:
    """What the model sees of a text, and all that its opinion depends on."""
    if len(text) > HEAD_CHARACTERS + TAIL_CHARACTERS:
        return f"{text[:HEAD_CHARACTERS]}\n...\n{text[-TAIL_CHARACTERS:]}"
    return text


def make_question(seen: str) -> UpstreamCall:
    return label_prompts.make_label_call((Input(seen, seen),), _QUESTIONS, question_first=True)


def estimate_prompt_tokens(seen: str) -> int:
    """An estimate for both questions together, instructions not counted: those are computed once for all requests."""
    return SEQUENCES * (estimate_tokens(seen) + MESSAGE_TOKENS)


def read_llm_profile(target: Target, reply: UpstreamReply) -> LlmProfile:
    """Raises BackendGarbage where the reply is no answer to `make_question`, or the error it holds instead."""
    (row,) = label_prompts.read_scores(reply.payload, 1, _QUESTIONS)
    if isinstance(row, ApplianceError):
        raise row
    task, difficulty = row
    chosen = _TASK.options[task.chosen].value
    known: dict[object, Task] = {name: name for name in _MEANINGS}
    if chosen not in known:
        raise BackendGarbage(f"{target.name} chose {chosen!r}, which was not among the tasks")
    highest = len(_DIFFICULTY.options) - 1
    return LlmProfile(target.name, known[chosen], task.confidence, difficulty.score / highest)


def make_profile_guess(llm_profile: LlmProfile | str, by_rules: ProfileEstimate) -> ProfileEstimate:
    """What the model said, or what the rules say and why the model did not."""
    if isinstance(llm_profile, str):
        return ProfileEstimate(by_rules.task, by_rules.complexity, (*by_rules.reasons, f"by rules: {llm_profile}"))
    who = f"{llm_profile.target}, confidence {llm_profile.confidence:.2f}"
    if llm_profile.confidence < SURE:
        why = f"by rules: {who} for {llm_profile.task} is too little"
        return ProfileEstimate(by_rules.task, by_rules.complexity, (*by_rules.reasons, why))
    scale = SIMPLE_SCALE if llm_profile.task in SIMPLE else 1.0
    moved = BASE_COMPLEXITY[llm_profile.task] + scale * _REACH * (llm_profile.difficulty - 0.5)
    complexity = round(min(max(moved, 0.0), 1.0), 4)
    because = f"{llm_profile.task}, difficulty {llm_profile.difficulty:.2f} says {llm_profile.target}"
    return ProfileEstimate(
        llm_profile.task, complexity, (f"{llm_profile.task}: {who}", f"complexity {complexity:.2f}: {because}")
    )
