"""What a variant costs in quality against its source: the same labels chosen, and how far the next-token distributions
lie apart, on texts that come with the program.

The texts are short, in eight fields and eleven languages; each is asked two questions. Nothing here says whether an
answer is right: only whether the variant answers as the source does.
"""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from appliance.errors import EngineFailed
from appliance.llamacpp.chat.message import MessageIn
from appliance.llamacpp.chat.prompts import PromptBuilder
from appliance.llamacpp.decode.sampling import compute_log_normalizer
from appliance.llamacpp.labels.jobs import LabelJob
from appliance.llamacpp.model import LlamaModel
from appliance.llamacpp.scheduler.step import StepRunner
from appliance.llamacpp.server.labels_api import build_label_request
from appliance.llamacpp.server.request_models import LabelItemIn, LabelsIn

_TEXTS_FILE: Final = Path(__file__).with_name("quality_texts.json")
_TIE_NATS: Final = 0.25
"""The source's own choice turns over at margins up to 0.2 when nothing but the precision of attention changes
(SmolLM2-135M Q4_1: 2 of 122 labels), so a label it finds this nearly as likely as its own is no other answer."""
_TASK: Final = "Answer the question about the text with exactly one of the possible answers, and nothing else."
_TEXTS_AT_ONCE: Final = 4
_FEWEST_TEXTS: Final = 8
_FIRST_POSITION: Final = 2
"""Before the third token a model knows nothing that a variant could spoil."""
_POSITIONS_PER_TEXT: Final = 12
_TOP_TOKENS: Final = 256
"""So many of the source's most likely tokens are compared one by one, all others as one: what that leaves out of the
divergence is far below what two runs of one variant differ by."""


@dataclass(frozen=True, slots=True)
class QualityQuestion:
    ask: str
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class QualityText:
    language: str
    text: str
    questions: tuple[QualityQuestion, ...]


@dataclass(frozen=True, slots=True)
class TokenDistribution:
    """A source's next-token distribution: its likeliest tokens, their log probabilities, and the rest's together."""

    tokens: npt.NDArray[np.intp]
    logprobs: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ModelReadings:
    """How the source read the texts: what variants are compared with."""

    texts: tuple[QualityText, ...]
    scores: tuple[Sequence[float], ...]
    """Of every text's every question: the log probability of each label."""
    distributions: tuple[TokenDistribution, ...]


@dataclass(frozen=True, slots=True)
class QualityComparison:
    """A variant against its source."""

    questions: int
    label_agreement: float
    """Share of the questions in which it chooses its source's label, or one that the source finds all but as likely."""
    same_label: float
    """Share of the questions in which it chooses the very same label."""
    positions: int
    median_kl: float
    """Kullback-Leibler divergence of the variant's next-token distribution from the source's, in nats."""
    mean_kl: float


@cache
def load_quality_texts() -> tuple[QualityText, ...]:
    """All texts; fields and languages alternate, so that the first few are a fair sample."""
    table = json.loads(_TEXTS_FILE.read_text("utf-8"))
    questions = {name: QualityQuestion(one["ask"], tuple(one["labels"])) for name, one in table["questions"].items()}
    return tuple(
        QualityText(row["language"], row["text"], tuple(questions[name] for name in table["domains"][row["domain"]]))
        for row in table["texts"]
    )


def read_source_model(model: LlamaModel, most_texts: int, seconds: float) -> ModelReadings:
    """Read up to `most_texts` of the texts; fewer, but at least eight, where `seconds` are over before."""
    ends = time.monotonic() + seconds
    scores: list[Sequence[float]] = []
    chosen = load_quality_texts()[:most_texts]
    read = 0
    scorer = _Scorer(model)
    while read < len(chosen) and (read < _FEWEST_TEXTS or time.monotonic() < ends):
        some = chosen[read : read + _TEXTS_AT_ONCE]
        scores += scorer.scores(some)
        read += len(some)
    model.memory_clear()
    used = chosen[:read]
    distributions = [_top(row) for text in used for row in _rows(model, scorer.prompts, text)]
    return ModelReadings(tuple(used), tuple(scores), tuple(distributions))


def compare_variant(model: LlamaModel, source: ModelReadings) -> QualityComparison:
    """How `model` differs from what was read with its source."""
    scorer = _Scorer(model)
    scores = scorer.scores(source.texts)
    model.memory_clear()
    rows = (row for text in source.texts for row in _rows(model, scorer.prompts, text))
    divergences = [_divergence(known, row) for known, row in zip(source.distributions, rows, strict=True)]
    margins = [_margin(theirs, mine) for theirs, mine in zip(source.scores, scores, strict=True)]
    return QualityComparison(
        questions=len(margins),
        label_agreement=round(sum(margin <= _TIE_NATS for margin in margins) / len(margins), 4),
        same_label=round(sum(margin == 0 for margin in margins) / len(margins), 4),
        positions=len(divergences),
        median_kl=round(statistics.median(divergences), 6),
        mean_kl=round(statistics.fmean(divergences), 6),
    )


def _margin(source: Sequence[float], variant: Sequence[float]) -> float:
    """How much likelier, in nats, the source finds its own label than the one the variant chooses."""
    return float(max(source) - source[int(np.argmax(variant))])


class _Scorer:
    """Label scores as the engine itself gives them."""

    def __init__(self, model: LlamaModel) -> None:
        model.memory_clear()
        self.prompts = PromptBuilder(model)
        self._model, self._runner = model, StepRunner(model)

    def scores(self, some: Sequence[QualityText]) -> list[Sequence[float]]:
        """The labels' log probabilities, for every question of every text."""
        call = _call(some, has_template=self.prompts.template is not None)
        ask = build_label_request(call, self.prompts, self._model)
        if ask.errors:
            raise EngineFailed(f"the model cannot be asked for labels: {next(iter(ask.errors.values()))}")
        job = LabelJob([ask.items[position] for position in range(len(call.items))])
        self._runner.submit_labels(job)
        while job.open:
            self._runner.run_step()
        results = [result for result in job.results if result is not None]
        failed = next((result.error for result in results if result.error is not None), None)
        if failed is not None:
            raise EngineFailed(f"labels cannot be scored: {failed}")
        return [result.logprobs for result in results]


def _call(some: Sequence[QualityText], *, has_template: bool) -> LabelsIn:
    """The instructions come first, so that texts which are asked the same share them."""
    sets: Mapping[str, list[str]] = {one.ask: list(one.labels) for text in some for one in text.questions}
    items = []
    for text in some:
        for question in text.questions:
            possible = "\n".join(f"- {label}" for label in question.labels)
            ask = f"{_TASK}\n\nQuestion: {question.ask}\nPossible answers:\n{possible}"
            if has_template:
                messages = [MessageIn(role="system", content=ask), MessageIn(role="user", content=text.text)]
                items.append(LabelItemIn(labels=question.ask, messages=messages))
            else:
                items.append(LabelItemIn(labels=question.ask, prompt=f"{ask}\n\nText: {text.text}\nAnswer:"))
    return LabelsIn(label_sets=dict(sets), items=items)


def _rows(model: LlamaModel, prompts: PromptBuilder, text: QualityText) -> list[npt.NDArray[np.float32]]:
    """Logits after some of the text's tokens, spread evenly over it. Views: valid until the next text is read."""
    model.memory_clear()
    tokens = prompts.tokenize_raw(text.text)[: model.batch.capacity_tokens]
    step = max(1, -(-(len(tokens) - _FIRST_POSITION) // _POSITIONS_PER_TEXT))
    model.batch.clear()
    start = 0
    for position in range(_FIRST_POSITION, len(tokens), step):
        model.batch.add(tokens[start : position + 1], start, 0, last_output=True)
        start = position + 1
    if not model.batch.size:
        return []
    code = model.decode()
    if code:
        raise EngineFailed(f"a decode failed with {code} while comparing variants: {model.last_log_lines()}")
    return list(model.rows)


def _top(row: npt.NDArray[np.float32]) -> TokenDistribution:
    count = min(_TOP_TOKENS, len(row) - 1)
    tokens = np.argpartition(row, -count)[-count:]
    return TokenDistribution(tokens, _with_rest(row, tokens))


def _divergence(known: TokenDistribution, row: npt.NDArray[np.float32]) -> float:
    p, q = known.logprobs, _with_rest(row, known.tokens)
    return max(0.0, float(np.sum(np.exp(p) * (p - q))))


def _with_rest(row: npt.NDArray[np.float32], tokens: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    """Log probabilities of `tokens`, and last the one of all others together."""
    logprobs = row[tokens].astype(np.float64) - compute_log_normalizer(row)
    rest = max(1e-12, 1.0 - float(np.sum(np.exp(logprobs))))
    return np.append(logprobs, np.log(rest))
