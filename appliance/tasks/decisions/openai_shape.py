"""Decisions: `POST /v1/decisions` in OpenAI's shape, and `POST /v1/decisions/batch` for many inputs in one call.

Response of the first: {model, answers: [...], usage}; answers in question order, as the official SDK types them, each
with `label_mass` besides (null where the target does not tell it). A score counts levels from 0 and is their mean.

Batch request: `inputs` (1 to 10,000) instead of `input`. Response: {model, results, usage}; results in order, each
{index, answers} or {index, error} with OpenAI's error object.

Ours besides, in both: `examples`, labelled texts that are shown to the model with the questions (examples.py);
`debias`, `calibrate`, `layout` and `task` (methods.py), for models whose labels are scored here (what a hosted model
says is given as it comes); and on an answer `unsure: true` where its label mass is low, and `calibrated_for` where a
task's fit was applied.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from appliance.core import Ability, ParsedRequest, Target, UpstreamCall, UpstreamReply, Usage
from appliance.core.json_types import JsonObject
from appliance.errors import ApplianceError, BackendGarbage, Unsupported
from appliance.tasks.classify import classifiers
from appliance.tasks.decisions import label_prompts, openai_decisions
from appliance.tasks.decisions.confidence import calibrate_scores, subtract_prior
from appliance.tasks.decisions.decision_options import (
    CONTENT_FREE,
    DEFAULT_CALIBRATION,
    DEFAULT_OPTIONS,
    OPTION_FIELDS,
    DecisionOptions,
    Priors,
    Tasks,
    hash_question,
    read_decision_options,
)
from appliance.tasks.decisions.decision_results import DecisionResult, Row, make_openai_payload, write_answers
from appliance.tasks.decisions.examples import attach_examples
from appliance.tasks.decisions.inputs import Input, read_input
from appliance.tasks.decisions.probabilities import ShareWriter
from appliance.tasks.decisions.questions import Question, QuestionResult, join_question_texts, read_questions
from appliance.wire.strict_fields import missing, read_list, read_model, refuse_other_contract
from appliance.wire.usage import estimate_tokens, write_responses_usage

MAX_INPUTS = 10_000
INPUTS_PER_CALL = 32
TOKENS_PER_CALL = 2_048
"""Of a batch. A call holds an engine for a few seconds at most (a small model on two cores computes 500 tokens/s),
others get their turn between two, and a failure costs no more than one."""

_OTHERS = {"state": "/v1/systemone", "inputs": "/v1/decisions/batch"}
_OWN_FIELDS = frozenset({"model", "input", "inputs", "questions", "examples", "stream"}) | OPTION_FIELDS
_NOTHING = Input(CONTENT_FREE, CONTENT_FREE)


@dataclass(frozen=True, slots=True)
class DecisionsCall:
    """Some questions about some inputs.

    `render` makes the caller's response from the result, where the call is a whole request.
    """

    inputs: tuple[Input, ...]
    questions: tuple[Question, ...]
    openai_questions: Sequence[JsonObject]
    """The questions on OpenAI's wire."""
    extras: JsonObject
    question_first: bool
    render: Callable[[DecisionResult, Sequence[Question]], Any] | None = None
    options: DecisionOptions = DEFAULT_OPTIONS
    priors: Priors = field(default_factory=Priors)
    """Shared by all calls of a program that keeps one."""
    for_classifier: bool = False
    """A classifier was named as the model, so nothing is ever put into a prompt."""
    every_label: bool = False
    """A classifier is asked only where the choices are all of its labels."""

    def streams(self, target: Target) -> bool:
        return False

    def verified_late(self) -> None:
        return None

    @property
    def prompt_tokens(self) -> int:
        """Every item whole, as engines report it: how much of it is shared and cached shows only when it was done.

        Of a batch no more than a call is cut to: one text that no context holds must not refuse all the others.
        """
        if self.for_classifier:
            return classifiers.count_tokens(self.inputs)
        texts = sum(estimate_tokens(text.text) for text in self.inputs)
        asks = sum(label_prompts.estimate_question_tokens(question) for question in self.questions)
        whole = self.options.method.ways * (len(self.questions) * texts + len(self.inputs) * asks)
        return whole if self.render is not None else min(whole, max(TOKENS_PER_CALL, self._asks_tokens))

    @property
    def _asks_tokens(self) -> int:
        """The longest question alone, which every text of a batch needs."""
        return max(label_prompts.estimate_question_tokens(question) for question in self.questions)

    @property
    def longest_prompt_tokens(self) -> int:
        """The longest single prompt: what a context must hold, however many items there are."""
        if self.for_classifier:
            return classifiers.count_tokens(self.inputs)
        return max(estimate_tokens(text.text) for text in self.inputs) + self._asks_tokens

    @property
    def output_tokens(self) -> int:
        return len(self.inputs) * len(self.questions) * self.options.method.ways

    def outgoing(self, target: Target) -> Sequence[UpstreamCall]:
        """Label scores where the target can give them, else OpenAI's own endpoint. Raises Unsupported."""
        has_image = any(text.has_image for text in self.inputs)
        if "classify" in target.abilities and not has_image:
            return (classifiers.make_classify_call(target, self.inputs, self.questions),)
        if "labels" in target.abilities and not has_image:
            method = self.options.method
            asks_prior = method.content_free and self.priors.wanted(self._prior_keys(target))
            inputs = (*self.inputs, _NOTHING) if asks_prior else self.inputs
            return (
                label_prompts.make_label_call(
                    inputs, self.questions, question_first=self.question_first, debias=method.debias, short=method.short
                ),
            )
        if "decisions" in target.abilities:
            return [
                openai_decisions.make_decision_call(text, self.openai_questions, self.extras) for text in self.inputs
            ]
        what = "look at images" if has_image else "answer decisions"
        raise Unsupported(f"{target.name} cannot {what}", param="input" if has_image else "model")

    def read(self, target: Target, replies: Sequence[UpstreamReply]) -> DecisionResult:
        """The result, rendered. Raises BackendGarbage, or a single input's own error."""
        rows: Sequence[Row]
        if "classify" in target.abilities:
            rows = classifiers.read_classification(
                target, replies[0].payload, self.questions, len(self.inputs), every_label=self.every_label
            )
        elif "labels" in target.abilities and not any(text.has_image for text in self.inputs):
            rows = self._read_labels(target, replies[0].payload)
        else:
            rows = [openai_decisions.read_answers(reply.payload, self.questions) for reply in replies]
        usage = sum((reply.usage for reply in replies), Usage())
        name = target.name if "classify" in target.abilities else target.model
        variant = classifiers.read_version(replies[0].payload) if "classify" in target.abilities else target.variant
        result = DecisionResult(name, tuple(rows), usage, target.name, variant)
        return self.rendered(result)

    def rendered(self, result: DecisionResult) -> DecisionResult:
        """`result` with the response as its payload, where this call is a whole request. Raises the input's error."""
        return result if self.render is None else replace(result, payload=self.render(result, self.questions))

    def _read_labels(self, target: Target, payload: object) -> Sequence[Row]:
        rows = list(label_prompts.read_label_scores(payload, self.questions, debias=self.options.method.debias))
        if len(rows) == len(self.inputs) + 1 and self.options.method.content_free:
            self._note_prior(target, rows.pop())
        if len(rows) != len(self.inputs):
            raise BackendGarbage("the engine's label scores do not match what was asked")
        priors = [self.priors.get(key) for key in self._prior_keys(target)]
        return [
            row if isinstance(row, ApplianceError) else self._read_question_result(target, row, priors) for row in rows
        ]

    def _read_question_result(
        self, target: Target, row: Sequence[label_prompts.ScoredLabels], priors: Sequence[tuple[float, ...] | None]
    ) -> tuple[QuestionResult, ...]:
        answers = []
        for question, scored, prior in zip(self.questions, row, priors, strict=True):
            scores = scored.scores
            if self.options.method.content_free:
                if prior is None:
                    raise BackendGarbage("the engine gave no scores for the text that says nothing")
                scores = subtract_prior(scores, prior)
            name, fit = self.options.fit(target, question) or (None, DEFAULT_CALIBRATION)
            shares = calibrate_scores(scores, fit.temperature, fit.bias)
            answers.append(QuestionResult(shares, scored.label_mass, scores, name))
        return tuple(answers)

    def _note_prior(self, target: Target, row: Sequence[label_prompts.ScoredLabels] | ApplianceError) -> None:
        if not isinstance(row, ApplianceError):
            for key, scored in zip(self._prior_keys(target), row, strict=True):
                self.priors.note(key, scored.scores)

    def _prior_keys(self, target: Target) -> Sequence[tuple[Any, ...]]:
        place = (target.name, target.variant, self.question_first, self.options.method)
        return [(*place, hash_question(question)) for question in self.questions]


def read_decision_request(
    body: JsonObject, tasks: Tasks | None = None, priors: Priors | None = None
) -> tuple[ParsedRequest, Sequence[DecisionsCall]]:
    """Check a decisions body. `tasks` None: a task it names is not looked up.

    Raises RequestError naming field, value and remedy, and NotFound for an unknown task.
    """
    refuse_other_contract(body, "/v1/decisions", "input", _OTHERS)
    questions = read_request_questions(body)
    text = read_input(body["input"], "input")
    call = make_call((text,), questions, _wired(body, questions), _extras(body), make_openai_payload)
    call = replace(
        call,
        options=read_decision_options(body, questions, tasks),
        priors=priors or call.priors,
        for_classifier=classifiers.names_classifier(body.get("model")),
    )
    return make_parsed_request(body, call), (call,)


def read_decision_batch(
    body: JsonObject, tasks: Tasks | None = None, priors: Priors | None = None
) -> tuple[ParsedRequest, Sequence[DecisionsCall]]:
    """Check a batch body and cut it into calls; `make_batch_payload` puts their results together again."""
    refuse_other_contract(body, "/v1/decisions/batch", "inputs", {"input": "/v1/decisions", "state": "/v1/systemone"})
    questions = read_request_questions(body)
    if body["inputs"] is None:
        raise missing("inputs", f"it must be a list of 1 to {MAX_INPUTS} inputs")
    rows = read_list(body["inputs"], "inputs", 1, MAX_INPUTS, "inputs")
    inputs = tuple(read_input(row, f"inputs[{index}]") for index, row in enumerate(rows))
    whole = make_call(inputs, questions, _wired(body, questions), _extras(body))
    whole = replace(
        whole,
        options=read_decision_options(body, questions, tasks),
        priors=priors or whole.priors,
        for_classifier=classifiers.names_classifier(body.get("model")),
    )
    return make_parsed_request(body, whole), split_call(whole)


def read_request_questions(body: JsonObject) -> tuple[Question, ...]:
    """A classifier's question need not be spelt out."""
    if classifiers.names_classifier(body.get("model")):
        left_open = classifiers.read_open_question(body.get("questions"))
        if left_open is not None:
            return (left_open,)
    return attach_examples(body, read_questions(body))


def _wired(body: JsonObject, questions: Sequence[Question]) -> Sequence[JsonObject]:
    """As they came, unless there is something to tell that the wire has no field for."""
    if any(question.examples for question in questions):
        return openai_decisions.write_openai_questions(questions)
    return body.get("questions") or ()


def split_call(whole: DecisionsCall, most_tokens: int = TOKENS_PER_CALL) -> Sequence[DecisionsCall]:
    """A call about many inputs as calls of about `most_tokens`, which an engine answers in a few seconds each.

    The layout stays that of the whole: a text's answer must not depend on which chunk it fell into.
    """
    return [replace(whole, inputs=chunk) for chunk in _chunks(whole, most_tokens)]


def _chunks(whole: DecisionsCall, most_tokens: int) -> Iterator[tuple[Input, ...]]:
    """The inputs in order, as many together as one call may hold; each at least alone."""
    inputs, ways = whole.inputs, whole.options.method.ways
    if whole.for_classifier:
        yield from (
            inputs[at : at + classifiers.INPUTS_PER_CALL] for at in range(0, len(inputs), classifiers.INPUTS_PER_CALL)
        )
        return
    # Examples are computed once for all texts.
    asks = sum(
        label_prompts.estimate_question_tokens(question) - label_prompts.estimate_example_tokens(question)
        for question in whole.questions
    )
    chunk: list[Input] = []
    tokens = 0
    for text in inputs:
        needed = ways * (asks + len(whole.questions) * estimate_tokens(text.text))
        if chunk and (len(chunk) == INPUTS_PER_CALL or tokens + needed > most_tokens):
            yield tuple(chunk)
            chunk, tokens = [], 0
        chunk.append(text)
        tokens += needed
    yield tuple(chunk)


def _extras(body: JsonObject) -> JsonObject:
    return {name: value for name, value in body.items() if name not in _OWN_FIELDS}


def make_call(
    inputs: tuple[Input, ...],
    questions: tuple[Question, ...],
    openai_questions: Sequence[JsonObject],
    extras: JsonObject,
    render: Callable[[DecisionResult, Sequence[Question]], Any] | None = None,
) -> DecisionsCall:
    # Examples are the longest part of a prompt, and stand before the text to be computed once.
    question_first = len(inputs) >= len(questions) or any(question.examples for question in questions)
    return DecisionsCall(inputs, questions, openai_questions, extras, question_first, render)


def make_parsed_request(body: JsonObject, call: DecisionsCall) -> ParsedRequest:
    needs: set[Ability] = {"vision"} if any(text.has_image for text in call.inputs) else set()
    texts = [text.text for text in call.inputs]
    return ParsedRequest(
        endpoint="decisions",
        model=read_model(body),
        body=body,
        text="\n".join((join_question_texts(call.questions), *texts)),
        format="labels",
        needs=frozenset(needs),
    )


def make_batch_payload(
    results: Sequence[DecisionResult | ApplianceError], calls: Sequence[DecisionsCall]
) -> JsonObject:
    """The response of /v1/decisions/batch, for orjson. A call that failed as a whole gives its error to each of its
    inputs."""
    rows: list[JsonObject] = []
    usage, models = Usage(), []
    writer = ShareWriter()
    for result, call in zip(results, calls, strict=True):
        answered = result.rows if isinstance(result, DecisionResult) else (result,) * len(call.inputs)
        for row in answered:
            index = {"index": len(rows)}
            if isinstance(row, ApplianceError):
                rows.append({**index, **row.to_openai()})
            else:
                rows.append({**index, "answers": write_answers(row, call.questions, writer)})
        if isinstance(result, DecisionResult):
            usage += result.usage
            models.append(result.model)
    return {
        "model": ", ".join(dict.fromkeys(models)) or None,
        "results": rows,
        "usage": write_responses_usage(usage),
    }
