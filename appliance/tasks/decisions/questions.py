"""Questions and answers as this project holds them, whichever wire format they came in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import orjson

from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.errors import RequestError
from appliance.tasks.decisions.confidence import UNSURE_LABEL_MASS, compute_expected_level, find_most_likely
from appliance.wire.strict_fields import missing, read_list, read_object, wrong

MAX_QUESTIONS = 400
MAX_CHOICES = 255
MAX_LEVELS = 10

Kind = Literal["predicate", "choice", "score"]


@dataclass(frozen=True, slots=True)
class Option:
    """One possible answer. A string and a boolean that read alike are different values."""

    value: str | bool
    description: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """A text and the index of the option that is right for it."""

    text: str
    option: int


@dataclass(frozen=True, slots=True)
class Question:
    """`options` in order: a predicate's are True and False, a score's are its levels from the lowest."""

    kind: Kind
    name: str | None
    instructions: str
    options: tuple[Option, ...]
    examples: tuple[Example, ...] = ()
    """Shown to the model before the text."""


@dataclass(frozen=True, slots=True)
class QuestionResult:
    """A question's answer: a probability for each option in order, or None where the model declined to answer."""

    probabilities: tuple[float, ...] | None
    label_mass: float | None = None
    """How much of the model's whole distribution fell on any option; None where the target does not tell."""
    scores: tuple[float, ...] = ()
    """What the probabilities were made of, before temperature and bias; empty where the target gives probabilities."""
    task: str | None = None
    """The task whose fit was applied."""
    options: tuple[Option, ...] = ()
    """What the probabilities are of, where the question left that to the target."""
    answered_by: str | None = None
    """The target that gave it, where several answered one request."""
    unsure: bool = False
    """It stands although it is unsure."""
    ood_score: float | None = None
    """Above 0 the text is like nothing that the target was trained on; None where it does not tell."""

    @property
    def chosen(self) -> int:
        assert self.probabilities is not None
        return find_most_likely(self.probabilities)

    @property
    def confidence(self) -> float:
        assert self.probabilities is not None
        return self.probabilities[self.chosen]

    @property
    def score(self) -> float:
        assert self.probabilities is not None
        return compute_expected_level(self.probabilities)

    @property
    def extra_fields(self) -> JsonObject:
        """What is told besides the answer itself, in every wire format."""
        extra_fields: MutableJsonObject = {"label_mass": self.label_mass}
        if self.label_mass is not None and self.label_mass < UNSURE_LABEL_MASS:
            extra_fields["unsure"] = True
        if self.ood_score is not None:
            extra_fields["out_of_scope_score"] = self.ood_score
            if self.ood_score > 0:
                extra_fields |= {"out_of_scope": True, "unsure": True}
        if self.unsure:
            extra_fields["unsure"] = True
        if self.answered_by is not None:
            extra_fields["answered_by"] = self.answered_by
        if self.task is not None:
            extra_fields["calibrated_for"] = self.task
        return extra_fields


PREDICATE = (Option(True), Option(False))


def read_questions(body: JsonObject) -> tuple[Question, ...]:
    """`questions` in OpenAI's shape. Raises RequestError naming the place."""
    if body.get("questions") is None:
        raise missing("questions", f"it must be a list of 1 to {MAX_QUESTIONS} questions")
    rows = read_list(body["questions"], "questions", 1, MAX_QUESTIONS, "questions")
    questions = tuple(_read_question(row, f"questions[{index}]") for index, row in enumerate(rows))
    seen: dict[str, int] = {}
    for index, question in enumerate(questions):
        if question.name is not None and seen.setdefault(question.name, index) != index:
            raise wrong(
                f"questions[{index}].name",
                question.name,
                f"questions[{seen[question.name]}] has the same name; names must be unique",
            )
    return questions


def _read_question(row: object, path: str) -> Question:
    question = read_object(row, path, "with type and instructions")
    kind = question.get("type")
    if kind not in ("predicate", "choice", "score"):
        raise wrong(f"{path}.type", kind, "it must be predicate, choice or score")
    name = question.get("name")
    if name is not None and not isinstance(name, str):
        raise wrong(f"{path}.name", name, "it must be a string")
    instructions = read_instructions(question.get("instructions"), f"{path}.instructions")
    if kind == "predicate":
        return Question("predicate", name, instructions, PREDICATE)
    if kind == "choice":
        return Question("choice", name, instructions, _read_choices(question.get("choices"), f"{path}.choices"))
    return Question("score", name, instructions, _read_levels(question.get("levels"), f"{path}.levels"))


def read_instructions(value: object, path: str) -> str:
    """A question's instructions: a string, or parts of text and JSON."""
    if value is None:
        raise missing(path, "say what is to be decided")
    if isinstance(value, list):
        value = "\n".join(read_part_text(part, f"{path}[{index}]") for index, part in enumerate(value))
    if not isinstance(value, str):
        raise wrong(path, value, "it must be a string or a list of parts")
    if not value.strip():
        raise RequestError(f"{path} is empty: say what is to be decided", param=path)
    return value


def read_part_text(part: object, path: str) -> str:
    """The text of one content part; an image has none here (see `inputs.has_image`)."""
    row = read_object(part, path, 'such as {"type": "input_text", "text": ...}')
    kind = row.get("type")
    if kind == "input_json":
        if not isinstance(row.get("data"), dict | list):
            raise wrong(f"{path}.data", row.get("data"), "it must be an object or a list of objects")
        return orjson.dumps(row["data"]).decode()
    if kind == "input_image":
        if not isinstance(row.get("image_url"), str):
            raise wrong(f"{path}.image_url", row.get("image_url"), "it must be a string")
        return ""
    field = "refusal" if kind == "refusal" else "text"
    if kind not in ("input_text", "output_text", "text", "refusal"):
        raise wrong(f"{path}.type", kind, "it must be input_text, input_image or input_json")
    if not isinstance(row.get(field), str):
        raise wrong(f"{path}.{field}", row.get(field), "it must be a string")
    return str(row[field])


def _read_choices(value: object, path: str) -> tuple[Option, ...]:
    if value is None:
        raise missing(path, f"a choice needs 2 to {MAX_CHOICES} choices")
    options = []
    for index, row in enumerate(read_list(value, path, 2, MAX_CHOICES, "choices")):
        choice = read_object(row, f"{path}[{index}]", '{"value": ..., "description": ...}')
        given = choice.get("value")
        if not isinstance(given, str | bool):
            raise wrong(f"{path}[{index}].value", given, "it must be a string or a boolean")
        options.append(Option(given, _description(choice, f"{path}[{index}]")))
    return require_unique_options(options, path)


def _read_levels(value: object, path: str) -> tuple[Option, ...]:
    if value is None:
        raise missing(path, f"a score needs 2 to {MAX_LEVELS} levels, from the lowest")
    options = []
    for index, row in enumerate(read_list(value, path, 2, MAX_LEVELS, "levels")):
        level = read_object(row, f"{path}[{index}]", '{"label": ..., "description": ...}')
        if not isinstance(level.get("label"), str):
            raise wrong(f"{path}[{index}].label", level.get("label"), "it must be a string")
        options.append(Option(level["label"], _description(level, f"{path}[{index}]")))
    return require_unique_options(options, path)


def _description(row: JsonObject, path: str) -> str | None:
    text = row.get("description")
    if text is not None and not isinstance(text, str):
        raise wrong(f"{path}.description", text, "it must be a string")
    return text


def require_unique_options(options: Sequence[Option], path: str) -> tuple[Option, ...]:
    """The options, none empty and none twice: probability could not be told apart between equals."""
    seen: dict[tuple[type, str | bool], int] = {}
    for index, option in enumerate(options):
        if isinstance(option.value, str) and not option.value.strip():
            raise RequestError(f"{path}[{index}] is empty: every option needs a text", param=f"{path}[{index}]")
        first = seen.setdefault((type(option.value), option.value), index)
        if first != index:
            raise wrong(f"{path}[{index}]", option.value, f"it is the same as {path}[{first}]; remove one of the two")
    return tuple(options)


def join_question_texts(questions: Sequence[Question]) -> str:
    """All text of the questions: instructions, options and descriptions are scanned like any other text."""
    pieces = []
    for question in questions:
        pieces.append(question.instructions)
        for option in question.options:
            pieces += [text for text in (option.value, option.description) if isinstance(text, str)]
    return "\n".join(pieces)
