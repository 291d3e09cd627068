"""Saved tasks: what is asked again and again under a name, so that callers send the name and a text.

`POST /v1/tasks` saves one: `name`, and for a decision `questions` (as /v1/decisions takes them, with descriptions of
options where they help) or a `classifier` or both, `examples`, `debias`, `calibrate`, `layout`; for an extraction
`schema`, `instructions`, `examples`, `normalise`, `evidence`, `chunk_tokens`, `max_tokens`; for both `model` (asked
where a request names none), `description` and `keys` (names of API keys; only these may use it).
A request {task, input | inputs | state | text | texts} becomes the request it stands for before anything else reads it.
`NAME@2` is the second version of a task. What was calibrated under the name is applied as long as its questions,
examples and method are still those that it was calibrated with.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from appliance.core import Caller
from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.errors import NotFound, RequestError
from appliance.tasks.classify.classifiers import PREFIX
from appliance.tasks.decisions import openai_shape, systemone
from appliance.tasks.decisions.decision_options import Tasks, hash_question, read_method, read_task
from appliance.tasks.extract import extraction
from appliance.wire.strict_fields import missing, read_list, read_text, wrong

SavedKind = Literal["decision", "extraction"]
Shape = Literal["decisions", "systemone", "extract", "calibrate"]
"""Of the body that is to be completed."""

MAX_KEYS: Final = 1_000
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PINNED: Final = re.compile(r"(.+)@([1-9]\d{0,8})")
_ABOUT: Final = ("name", "kind", "description", "keys", "model")
_OWN: Final[Mapping[SavedKind, tuple[str, ...]]] = {
    "decision": ("questions", "classifier", "examples", "debias", "calibrate", "layout"),
    "extraction": ("schema", "instructions", "examples", "normalise", "evidence", "chunk_tokens", "max_tokens"),
}
_FIXED: Final[Mapping[SavedKind, tuple[str, ...]]] = {
    "decision": ("questions", "examples", "debias", "calibrate", "layout"),
    "extraction": ("schema", "instructions", "examples"),
}
"""What a request that names a task may not say besides."""
_METHOD: Final = ("debias", "calibrate", "layout")
_SHOWN: Final = 8


@dataclass(frozen=True, slots=True)
class SavedTask:
    """One version of a task."""

    name: str
    kind: SavedKind
    version: int
    made_at: str
    """ISO 8601, UTC."""
    fields: JsonObject
    """What completes a request."""
    description: str | None = None
    keys: tuple[str, ...] = ()
    """Who may use it; empty: everybody."""

    def open_to(self, caller: Caller) -> bool:
        return not self.keys or caller.name in self.keys or "admin" in caller.scopes

    @property
    def definition(self) -> JsonObject:
        """All that tells one version from another."""
        return {"kind": self.kind, "description": self.description, "keys": list(self.keys), **self.fields}


Saved = Mapping[str, Sequence[SavedTask]]
"""By name; versions from the oldest."""


def read_saved_task(body: JsonObject, version: int, made_at: str) -> SavedTask:
    """Check a definition by reading a request that it would complete. Raises RequestError naming field and value."""
    name = body.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise wrong("name", name, "it must be 1 to 64 letters, digits, points, hyphens and underlines")
    kind = _kind(body)
    known = (*_ABOUT, *_OWN[kind])
    for field in body:
        if field not in known:
            raise RequestError(
                f"{field} is not known: {'an' if kind == 'extraction' else 'a'} {kind} has {', '.join(known)}",
                param=field,
            )
    description = read_text(body, "description")
    keys = _keys(body.get("keys"))
    fields = {field: body[field] for field in ("model", *_OWN[kind]) if body.get(field) is not None}
    saved = SavedTask(name, kind, version, made_at, fields, description, keys)
    _check(saved)
    return saved


def _kind(body: JsonObject) -> SavedKind:
    decides = body.get("questions") is not None or body.get("classifier") is not None
    extracts = body.get("schema") is not None
    if decides == extracts:
        what = (
            "both questions (or a classifier) and a schema"
            if decides
            else "neither questions, a classifier nor a schema"
        )
        raise RequestError(
            f"the task has {what}: give the one or the other", param="schema" if decides else "questions"
        )
    kind: SavedKind = "decision" if decides else "extraction"
    if body.get("kind") not in (None, kind):
        raise wrong("kind", body["kind"], f"with these fields it is {kind!r}")
    return kind


def _keys(given: object) -> tuple[str, ...]:
    if given is None:
        return ()
    rows = read_list(given, "keys", 1, MAX_KEYS, "names of keys")
    for index, row in enumerate(rows):
        if not isinstance(row, str) or not row:
            raise wrong(f"keys[{index}]", row, "it must be the name of an API key")
    return tuple(rows)


def _check(saved: SavedTask) -> None:
    if saved.kind == "extraction":
        extraction.read_extract_request({**saved.fields, "text": "x"})
        return
    classifier = saved.fields.get("classifier")
    if classifier is not None and (not isinstance(classifier, str) or not _NAME.fullmatch(classifier)):
        raise wrong("classifier", classifier, "it must be a classifier's name (GET /v1/classifiers lists them)")
    for field in ("examples", *_METHOD):
        if field in saved.fields and "questions" not in saved.fields:
            raise missing("questions", f"{field} belongs to questions that a model is asked")
    openai_shape.read_decision_request(_completed(saved, {"input": "x"}, "decisions", {}))
    if "questions" in saved.fields:
        openai_shape.read_decision_request({**_without(saved.fields, ("classifier", "model")), "input": "x"})


def find_task(name: str, saved: Saved, caller: Caller) -> SavedTask | None:
    """The task of that name, or that version of it, as far as the caller may use it."""
    if name in saved:
        found = saved[name][-1]
        return found if found.open_to(caller) else None
    pinned = _PINNED.fullmatch(name)
    if pinned is None or pinned[1] not in saved or not saved[pinned[1]][-1].open_to(caller):
        return None
    return next((one for one in saved[pinned[1]] if one.version == int(pinned[2])), None)


def expand_task(body: JsonObject, shape: Shape, saved: Saved, fits: Tasks, caller: Caller) -> JsonObject:
    """The body that one naming a saved task stands for; any other body as it came.

    Raises NotFound for an unknown task of an extraction, and RequestError where the request and the task do not go
    together. A name that is only calibrated is left to the reader of decisions.
    """
    if body.get("task") is None:
        return body
    name = read_task(body) or ""
    task = find_task(name, saved, caller)
    if task is None:
        if shape == "extract" or (name not in fits and body.get("questions") is None):
            raise make_unknown_task_error(name, saved, caller)
        return body
    wanted: SavedKind = "extraction" if shape == "extract" else "decision"
    if task.kind != wanted:
        place = "/v1/extract" if task.kind == "extraction" else "/v1/decisions"
        raise RequestError(f"task {name!r} is of kind {task.kind}: send it to {place}", param="task")
    for field in _FIXED[task.kind]:
        if body.get(field) is not None and not (shape == "calibrate" and field == "examples"):
            raise RequestError(f"{field} is the task's when task names a saved one: leave it out", param=field)
    return _completed(task, body, shape, fits)


def make_unknown_task_error(name: str, saved: Saved, caller: Caller) -> NotFound:
    names = [known for known, versions in sorted(saved.items()) if versions[-1].open_to(caller)]
    shown = ", ".join(map(repr, names[:_SHOWN])) or "none yet"
    error = NotFound(f"task {name[:80]!r} has not been saved here; there are: {shown}")
    error.param = "task"
    return error


def _completed(task: SavedTask, body: JsonObject, shape: Shape, fits: Tasks) -> JsonObject:
    if shape == "extract":
        return {**task.fields, **_without(body, ("task",))}
    fields = dict(_without(task.fields, ("classifier",)))
    if shape == "calibrate":
        shown = fields.pop("examples", None)
        return {**fields, **body, "task": task.name} | ({} if shown is None else {"few_shot": shown})
    whole = {**fields, **_without(body, ("task", "model"))}
    model = _model(task, body)
    if model is not None:
        whole["model"] = model
    if shape == "systemone" and "questions" in whole:
        whole["questions"] = _as_system_one(whole["questions"])
    if model is None or not model.startswith(PREFIX):
        return _calibrated(task, whole, shape, fits)
    return whole


def _model(task: SavedTask, body: JsonObject) -> Any:
    """The request's own, the task's classifier, or the task's model, in this order."""
    given = body.get("model")
    if given not in (None, "auto"):
        return given
    classifier = task.fields.get("classifier")
    return f"{PREFIX}{classifier}" if classifier is not None else task.fields.get("model", given)


def _calibrated(task: SavedTask, whole: MutableJsonObject, shape: Shape, fits: Tasks) -> JsonObject:
    """Names the task's fit, where there is one and it was made for just these questions and this method."""
    rows = fits.get(task.name, ())
    if not rows or rows[0].method != read_method(whole):
        return whole
    is_systemone = shape == "systemone"
    read_questions = systemone.read_systemone_questions if is_systemone else openai_shape.read_request_questions
    questions = read_questions(whole)
    known = {key for row in rows for key in row.fits}
    if not all(hash_question(question) in known for question in questions):
        return whole
    return {**_without(whole, _METHOD), "task": task.name}


def has_valid_calibration(task: SavedTask, fits: Tasks) -> bool:
    """Whether what was calibrated under the task's name is still true of it."""
    if task.kind != "decision" or "questions" not in task.fields:
        return False
    plain = _without(task.fields, ("classifier", "model"))
    return "task" in _calibrated(task, dict(plain), "decisions", fits)


def _as_system_one(questions: Sequence[JsonObject]) -> JsonObject:
    """Questions in OpenAI's shape as System One has them; one without a name is called `answer` or by its place."""
    rows: MutableJsonObject = {}
    for place, question in enumerate(questions, 1):
        name = question.get("name") or ("answer" if len(questions) == 1 else f"answer{place}")
        row: MutableJsonObject = {"instructions": question.get("instructions")}
        if question["type"] == "predicate":
            row["type"] = "noul"
        elif question["type"] == "choice":
            choices = question.get("choices") or ()
            criteria = {_spelt(one["value"]): one.get("description") for one in choices}
            row |= {"type": "choice", "criteria": criteria}
        else:
            levels = [": ".join(filter(None, (one["label"], one.get("description")))) for one in question["levels"]]
            row |= {"type": "score", "criteria": levels}
        rows[name] = row
    return rows


def _spelt(value: str | bool) -> str:
    return value if isinstance(value, str) else str(value).lower()


def _without(body: JsonObject, names: Sequence[str]) -> JsonObject:
    return {name: value for name, value in body.items() if name not in names}
