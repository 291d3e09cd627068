"""Decisions put to a model that scores labels: the prompt's layout, the labels' spelling, and reading the scores.

Layout: what is the same for most items comes first, so that the engine computes it once. Many texts and few questions
put the question into the system message; one text and several questions put the text there.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from appliance.core import UpstreamCall
from appliance.core.json_types import MutableJsonObject
from appliance.errors import ApplianceError, BackendGarbage, BackendRefused, ContextTooLong
from appliance.tasks.decisions.confidence import average_scores, calibrate_scores, normalise_logprobs
from appliance.tasks.decisions.inputs import Input
from appliance.tasks.decisions.questions import Option, Question, QuestionResult
from appliance.wire.usage import MESSAGE_TOKENS, estimate_tokens

PATH = "/labels"
MAX_LABEL_CHARS = 40
"""Longer options are shown with a number and answered by it: a sentence is never a likely answer word for word."""

CUE = "Label: "
"""Begins the model's answer. Chat models open with a sentence of their own otherwise: on SmolLM2-135M it raised the
label mass from 0.01 to 0.19 (4 news topics) and from 0.002 to 0.025 (8 banking intents), where it also named 36 of 80
texts rightly instead of 20."""

SHORT_CUE = "\nLabel: "
"""Follows the text within its turn: five tokens fewer for every text on SmolLM2 (33 of 38 with a text of 31), for chat
models give up their template's turns. There, on 24 texts each, it named as many right (banking 8 of 24 against 7, news
13 and 13), with a tenth to a fifth of the label mass."""

_ITEM = re.compile(r"^items\[\d+\](?:\.\w+)*: ")

_TASK = "Answer the question about the text with exactly one of the possible answers, and nothing else."
_ASKS = {
    "predicate": "Is this true of the text, yes or no?",
    "choice": "Question:",
    "score": "Rate the text, from the lowest level to the highest:",
}
_REVERSED_SCORE = "Rate the text, from the highest level to the lowest:"


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """A question as it is put to the model: one of several where the order of its options should not count."""

    ask: str
    labels: tuple[str, ...]
    options: tuple[int, ...]
    """Which option each label stands for."""


@dataclass(frozen=True, slots=True)
class ScoredLabels:
    """A question's answer before it is calibrated: a score for each option in order (see `confidence`)."""

    scores: tuple[float, ...]
    label_mass: float | None


def list_label_texts(question: Question, *, debias: bool) -> tuple[PromptLayout, ...]:
    """The question with its options in order and, for `debias`, also in reverse."""
    labels = list_labels(question)
    count = len(labels)
    forward = PromptLayout(_asks(question, labels), labels, tuple(range(count)))
    if not debias:
        return (forward,)
    if question.kind == "choice" and not _is_spelled(question.options[0], labels[0]):
        # Numbers say where an option stands, so they are given anew; a level's number says how high it is.
        options = tuple(reversed(question.options))
        return forward, PromptLayout(_asks(question, labels, options), labels, tuple(reversed(range(count))))
    turned = _asks(question, labels[::-1], question.options[::-1], _REVERSED_SCORE)
    return forward, PromptLayout(turned, labels, tuple(range(count)))


def list_labels(question: Question) -> tuple[str, ...]:
    """A distinguishable label for every option, in order."""
    if question.kind == "predicate":
        return ("yes", "no")
    texts = [_spelling(option.value) for option in question.options]
    plain = len({text.casefold() for text in texts}) == len(texts)
    if plain and all(len(text) <= MAX_LABEL_CHARS and "\n" not in text for text in texts):
        return tuple(texts)
    first = 0 if question.kind == "score" else 1
    return tuple(str(number) for number in range(first, first + len(texts)))


def _spelling(value: str | bool) -> str:
    return value.strip() if isinstance(value, str) else str(value).lower()


def estimate_question_tokens(question: Question) -> int:
    """About how many tokens an item has besides its text."""
    ask = estimate_tokens(f"{_TASK}{_asks(question, list_labels(question))}{CUE}") + 2 * MESSAGE_TOKENS
    return ask + estimate_example_tokens(question)


def estimate_example_tokens(question: Question) -> int:
    """About how many of these its examples are."""
    if not question.examples:
        return 0
    labels = list_labels(question)
    return sum(
        estimate_tokens(example.text) + estimate_tokens(f"{CUE}{labels[example.option]}") + 2 * MESSAGE_TOKENS
        for example in question.examples
    )


def make_label_call(
    inputs: Sequence[Input],
    questions: Sequence[Question],
    *,
    question_first: bool,
    debias: bool = False,
    short: bool = False,
) -> UpstreamCall:
    """One call that scores every wording of every question for every input, inputs outermost.

    A question's examples stand between its system message and the text, as turns that have been answered.
    """
    names: dict[tuple[str, ...], str] = {}
    asked = []
    for question in questions:
        for wording in list_label_texts(question, debias=debias):
            names.setdefault(wording.labels, f"set{len(names)}")
            asked.append((wording.ask, tuple(_turns(question, wording, short=short)), names[wording.labels]))
    layout = _question_first if question_first else _text_first
    items = [(*layout(text.text, ask), turns, labels) for text in inputs for ask, turns, labels in asked]
    body: MutableJsonObject = {"label_sets": {name: list(labels) for labels, name in names.items()}}
    body |= {"cue": SHORT_CUE, "open_turn": True} if short else {"cue": CUE}
    if len({(system, turns) for system, _, turns, _ in items}) == 1:
        system, _, turns, _ = items[0]
        body["messages"] = _messages(system, turns)
        body["items"] = [{"content": user, "labels": labels} for _, user, _, labels in items]
    else:
        body["items"] = [
            {"messages": [*_messages(system, turns), _message("user", user)], "labels": labels}
            for system, user, turns, labels in items
        ]
    return UpstreamCall(PATH, body)


def _turns(question: Question, wording: PromptLayout, *, short: bool) -> Iterator[tuple[str, str]]:
    """(role, content) of the examples. In the short layout the answer stands within the text's turn, as there."""
    for example in question.examples:
        label = wording.labels[wording.options.index(example.option)]
        if short:
            yield "user", f"{example.text}{SHORT_CUE}{label}"
        else:
            yield "user", example.text
            yield "assistant", f"{CUE}{label}"


def _messages(system: str, turns: Sequence[tuple[str, str]]) -> list[Mapping[str, str]]:
    return [_message("system", system), *(_message(role, content) for role, content in turns)]


def _message(role: str, content: str) -> Mapping[str, str]:
    return {"role": role, "content": content}


def _question_first(text: str, ask: str) -> tuple[str, str]:
    return f"{_TASK}\n\n{ask}", text


def _text_first(text: str, ask: str) -> tuple[str, str]:
    return f"{_TASK}\n\nText:\n{text}", ask


def _asks(
    question: Question, labels: Sequence[str], options: Sequence[Option] | None = None, score_ask: str | None = None
) -> str:
    """The question and its possible answers, `options` (the question's own otherwise) in their order."""
    ask = score_ask if question.kind == "score" and score_ask else _ASKS[question.kind]
    lines = [f"{ask} {question.instructions}", "Possible answers:"]
    for option, label in zip(options or question.options, labels, strict=True):
        is_spelled = question.kind == "predicate" or _is_spelled(option, label)
        meaning = [] if is_spelled else [_shown(option.value)]
        meaning += [option.description] if option.description else []
        lines.append(": ".join((f"- {label}", *meaning)))
    return "\n".join(lines)


def _is_spelled(option: Option, label: str) -> bool:
    return label == _spelling(option.value)


def _shown(value: str | bool) -> str:
    return f'"{value}"' if isinstance(value, str) else f"{str(value).lower()} (not the word)"


def read_scores(
    payload: object, inputs: int, questions: Sequence[Question]
) -> Sequence[tuple[QuestionResult, ...] | ApplianceError]:
    """Answers to all questions for each input as the model gives them, or why there are none for it.

    Raises BackendGarbage.
    """
    rows = read_label_scores(payload, questions)
    if len(rows) != inputs:
        raise BackendGarbage("the engine's label scores do not match what was asked")
    return [
        row
        if isinstance(row, ApplianceError)
        else tuple(QuestionResult(calibrate_scores(one.scores), one.label_mass, one.scores) for one in row)
        for row in rows
    ]


def read_label_scores(
    payload: object, questions: Sequence[Question], *, debias: bool = False
) -> Sequence[tuple[ScoredLabels, ...] | ApplianceError]:
    """The scores of all questions for each input, or why there are none for it. Raises BackendGarbage."""
    results = payload.get("results") if isinstance(payload, dict) else None
    asked = [list_label_texts(question, debias=debias) for question in questions]
    width = sum(map(len, asked))
    if not isinstance(results, list) or len(results) % width:
        raise BackendGarbage("the engine's label scores do not match what was asked")
    rows: list[tuple[ScoredLabels, ...] | ApplianceError] = []
    for start in range(0, len(results), width):
        here = results[start : start + width]
        errors = [result["error"] for result in here if isinstance(result, dict) and result.get("error")]
        if errors:
            rows.append(_error(errors[0]))
        else:
            following = iter(here)
            rows.append(tuple(_mean([_scored(next(following), one) for one in wording]) for wording in asked))
    return rows


def _mean(scored: Sequence[ScoredLabels]) -> ScoredLabels:
    masses = [one.label_mass for one in scored if one.label_mass is not None]
    mass = sum(masses) / len(masses) if len(masses) == len(scored) else None
    return ScoredLabels(average_scores([one.scores for one in scored]), mass)


def _error(error: object) -> ApplianceError:
    """One item's error, without the engine's name for the item. Such an input would fail at any target."""
    message = error.get("message") if isinstance(error, dict) else error
    code = error.get("code") if isinstance(error, dict) else None
    kind = ContextTooLong if code == ContextTooLong.code else BackendRefused
    return kind(_ITEM.sub("", str(message)), param="input", status=400)


def _scored(result: object, wording: PromptLayout) -> ScoredLabels:
    labels = result.get("labels") if isinstance(result, dict) else None
    if not isinstance(result, dict) or not isinstance(labels, list) or len(labels) != len(wording.labels):
        raise BackendGarbage("a label score of the engine does not have one entry for each label")
    try:
        logprobs = [-float("inf") if row["logprob"] is None else float(row["logprob"]) for row in labels]
        scores = normalise_logprobs(logprobs)
        mass = result.get("label_mass")
        by_option = tuple(scores[wording.options.index(option)] for option in range(len(scores)))
        return ScoredLabels(by_option, None if mass is None else float(mass))
    except (KeyError, TypeError, ValueError) as error:
        raise BackendGarbage(f"a label score of the engine cannot be read: {error!r}") from error
