"""How decisions are to be judged, beyond asking once: what a request's `debias`, `calibrate`, `layout` and `task`
mean.

`debias: true` asks every question twice, with the options in order and reversed. `calibrate: "content_free"` asks it
about a text that says nothing too. `layout: "short"` saves the tokens between a text and its label (labels.py says what
that costs). `task: NAME` applies what was fitted for that task (fitting.py) with the method it
was fitted with.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from appliance.core import Target
from appliance.core.json_types import JsonObject
from appliance.errors import NotFound, RequestError
from appliance.tasks.decisions.confidence import DEFAULT_TEMPERATURE
from appliance.tasks.decisions.questions import Question
from appliance.wire.strict_fields import read_bool, wrong

CONTENT_FREE = "N/A"
"""The text that says nothing. Chat templates may drop an empty turn, so it has letters."""
OPTION_FIELDS = frozenset({"debias", "calibrate", "layout", "task"})
_MAX_NAME_CHARS = 128
_MAX_PRIORS = 4_096
_PRIOR_USES = 1_000
"""After so many a prior is asked for again: the target may have got other weights under the same name."""


@dataclass(frozen=True, slots=True)
class DecisionMethod:
    debias: bool = False
    content_free: bool = False
    short: bool = False

    @property
    def ways(self) -> int:
        """In how many ways each question is put."""
        return 2 if self.debias else 1


DEFAULT_METHOD = DecisionMethod()


@dataclass(frozen=True, slots=True)
class CalibrationParameters:
    """Of one question: scores / temperature + bias, a bias for each option in order (none: no biases)."""

    temperature: float
    bias: tuple[float, ...] = ()


DEFAULT_CALIBRATION = CalibrationParameters(DEFAULT_TEMPERATURE)


@dataclass(frozen=True, slots=True)
class TaskCalibration:
    """What was fitted for a task on one target in one variant."""

    task: str
    target: str
    variant: str | None
    method: DecisionMethod
    fits: Mapping[str, CalibrationParameters]
    """By `hash_question`."""


Tasks = Mapping[str, Sequence[TaskCalibration]]
"""By task's name."""


@dataclass(frozen=True, slots=True)
class DecisionOptions:
    """The method of one request, and the fits it may be given."""

    method: DecisionMethod = DEFAULT_METHOD
    fits: Sequence[TaskCalibration] = ()

    def fit(self, target: Target, question: Question) -> tuple[str, CalibrationParameters] | None:
        """The task's name and its fit for what `target` says to `question`."""
        for row in self.fits:
            if (row.target, row.variant) == (target.name, target.variant):
                found = row.fits.get(hash_question(question))
                return None if found is None else (row.task, found)
        return None


DEFAULT_OPTIONS = DecisionOptions()


def hash_question(question: Question) -> str:
    """Equal for questions that put the same options under the same instructions and examples, whatever their names."""
    options = [(type(option.value).__name__, option.value, option.description) for option in question.options]
    said: list[Any] = [question.kind, question.instructions, options]
    if question.examples:
        said.append([(example.text, example.option) for example in question.examples])
    return hashlib.sha256(orjson.dumps(said)).hexdigest()[:32]


def read_decision_options(body: JsonObject, questions: Sequence[Question], tasks: Tasks | None) -> DecisionOptions:
    """The method that a body asks for. `tasks` None: names are not looked up. Raises RequestError or NotFound."""
    method = read_method(body)
    name = read_task(body)
    if name is None or tasks is None:
        return DecisionOptions(method)
    fits = tasks.get(name, ())
    if not fits:
        known = ", ".join(map(repr, sorted(tasks)[:8])) or "none yet"
        error = NotFound(f"task {name!r} has not been calibrated here; there are: {known}")
        error.param = "task"
        raise error
    for field in ("debias", "calibrate", "layout"):
        if body.get(field) is not None:
            raise RequestError(f"{field} is the task's when task is given: leave one of the two out", param=field)
    known_keys = {key for row in fits for key in row.fits}
    for index, question in enumerate(questions):
        if hash_question(question) not in known_keys:
            raise RequestError(
                f"questions[{index}] is not one that task {name!r} was calibrated for: its instructions, options and "
                "descriptions must be the same; calibrate it again or leave task out",
                param=f"questions[{index}]",
            )
    return DecisionOptions(fits[0].method, fits)


def read_method(body: JsonObject) -> DecisionMethod:
    calibrate = body.get("calibrate")
    if calibrate not in (None, "none", "content_free"):
        raise wrong("calibrate", calibrate, 'it must be "content_free" or "none"')
    layout = body.get("layout")
    if layout not in (None, "chat", "short"):
        raise wrong("layout", layout, 'it must be "chat" or "short"')
    return DecisionMethod(read_bool(body, "debias"), calibrate == "content_free", layout == "short")


def read_task(body: JsonObject) -> str | None:
    name = body.get("task")
    if name is None:
        return None
    if not isinstance(name, str) or not name.strip() or len(name) > _MAX_NAME_CHARS:
        raise wrong("task", name, f"it must be a name of 1 to {_MAX_NAME_CHARS} characters")
    return name


class Priors:
    """Scores for the text that says nothing, by target, question and layout: asked for once and used often.

    Written by the calls that asked, read by those that follow.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[Any, ...], tuple[tuple[float, ...], int]] = OrderedDict()

    def wanted(self, keys: Sequence[tuple[Any, ...]]) -> bool:
        """Whether one of them is not known, or has been used so often that it is due again."""
        for key in keys:
            scores, uses = self._known.get(key, ((), _PRIOR_USES))
            if uses >= _PRIOR_USES:
                return True
            self._known[key] = scores, uses + 1
        return False

    def note(self, key: tuple[Any, ...], scores: tuple[float, ...]) -> None:
        self._known[key] = scores, 0
        self._known.move_to_end(key)
        while len(self._known) > _MAX_PRIORS:
            self._known.popitem(last=False)

    def get(self, key: tuple[Any, ...]) -> tuple[float, ...] | None:
        found = self._known.get(key)
        return None if found is None else found[0]
