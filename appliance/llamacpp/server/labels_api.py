"""POST /v1/labels: the probability of every label of a set, for many texts in one call.

Request: `label_sets` {name: [label, ...]}, `items` [{labels: name, and one of content | messages | prompt}], and
optionally `messages` (shared, before every item's own), `cue` (the beginning of the assistant's answer), `open_turn`
(true: the cue follows the last message within its turn, which saves the tokens that end it and open the assistant's),
`ending`, `tolerance`, `cache_salt`, `priority` (lower first), `model`. Reply: `results`, one for each item in order,
each {labels: [{label, logprob, probability}], label_mass, prompt_tokens, cached_tokens} or {error}, and one `usage`.

`logprob` is the whole label's likelihood; `probability` is its share among the labels of the set, so these sum to 1;
`label_mass` says how probable it was that the text went on with any of them.

Of large sets the labels that cannot matter are not computed to their ends: the probabilities of the set differ from
the exact ones by at most `tolerance` (0.001; half the sum of all differences), `label_mass` by that share of itself,
and the most probable label is the same. `logprob` of a label left out is what it has at most, shared with those that
begin alike. With 0 every label is computed.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from appliance.core.json_types import MutableJsonObject
from appliance.errors import ApplianceError, RequestError, Unsupported
from appliance.llamacpp.chat.message import MessageIn
from appliance.llamacpp.chat.prompts import LabelTail, PromptBuilder
from appliance.llamacpp.engine_protocol import LabelItem, LabelScores
from appliance.llamacpp.server.generation import TokenUsage
from appliance.llamacpp.server.openai_replies import IMPOSSIBLE_LOGPROB, write_usage
from appliance.llamacpp.server.openai_requests import ModelLimits, check_length, join_cache_salt
from appliance.llamacpp.server.request_models import LabelItemIn, LabelsIn

MAX_LABELS = 1_024


@dataclass(frozen=True, slots=True)
class LabelRequest:
    """A checked call: what the engine is to score, and by position what cannot be."""

    items: Mapping[int, LabelItem]
    errors: Mapping[int, ApplianceError]
    names: Sequence[Sequence[str]]
    """The labels of every item, in the caller's words."""


def build_label_request(call: LabelsIn, prompts: PromptBuilder, limits: ModelLimits) -> LabelRequest:
    """Tokenises everything: 10,000 texts take about a second, so this belongs in a thread.

    Raises RequestError when the call as a whole is wrong. What is wrong with one item only stands in its place.
    """
    for name, labels in call.label_sets.items():
        _check_set(name, labels)
    items: dict[int, LabelItem] = {}
    errors: dict[int, ApplianceError] = {}
    tails: dict[tuple[str, str], LabelTail] = {}
    for position, item in enumerate(call.items):
        _check_item(position, item, call, prompts)
        try:
            items[position] = _item(position, item, call, prompts, limits, tails)
        except ApplianceError as error:
            if error.param is not None and error.param.startswith("label_sets"):
                raise
            errors[position] = error
    return LabelRequest(items, errors, [call.label_sets[item.labels] for item in call.items])


def write_label_reply(request: LabelRequest, scores: Sequence[LabelScores], model: str) -> MutableJsonObject:
    """The reply's body. `scores` are those of `request.items`, in order."""
    usage = TokenUsage()
    results: list[MutableJsonObject] = []
    found = dict(zip(request.items, scores, strict=True))
    for position, names in enumerate(request.names):
        score = found.get(position)
        if score is None:
            results.append(dict(request.errors[position].to_openai()))
            continue
        usage.prompt_tokens += score.prompt_tokens
        usage.cached_tokens += score.cached_tokens
        if score.error is not None:
            failure = ApplianceError(
                f"items[{position}]: could not be scored: {score.error}", param=f"items[{position}]"
            )
            results.append(dict(failure.to_openai()))
        else:
            results.append(_result(names, score))
    return {"object": "list", "model": model, "results": results, "usage": write_usage(usage)}


def compute_shares(logprobs: Sequence[float]) -> list[float]:
    """Softmax. Equal shares when every label was impossible."""
    highest = max(logprobs)
    if not math.isfinite(highest):
        return [1 / len(logprobs)] * len(logprobs)
    weights = [math.exp(logprob - highest) for logprob in logprobs]
    whole = sum(weights)
    return [weight / whole for weight in weights]


def _result(names: Sequence[str], score: LabelScores) -> MutableJsonObject:
    labels = [
        {"label": name, "logprob": max(float(logprob), IMPOSSIBLE_LOGPROB), "probability": share}
        for name, logprob, share in zip(names, score.logprobs, compute_shares(score.logprobs), strict=True)
    ]
    return {
        "labels": labels,
        "label_mass": score.label_mass,
        "prompt_tokens": score.prompt_tokens,
        "cached_tokens": score.cached_tokens,
    }


def _check_set(name: str, labels: Sequence[str]) -> None:
    field = f"label_sets.{name}"
    if not 2 <= len(labels) <= MAX_LABELS:
        raise RequestError(f"{field}: has {len(labels)} labels; give 2 to {MAX_LABELS}", param=field)
    if "" in labels:
        raise RequestError(f"{field}[{labels.index('')}]: is empty; every label needs text", param=field)
    twice = [label for label, times in Counter(labels).items() if times > 1]
    if twice:
        raise RequestError(f"{field}: {twice[0]!r:.80} stands in it more than once; keep one", param=field)


def _check_item(position: int, item: LabelItemIn, call: LabelsIn, prompts: PromptBuilder) -> None:
    field = f"items[{position}]"
    if item.labels not in call.label_sets:
        known = ", ".join(map(repr, list(call.label_sets)[:8]))
        raise RequestError(
            f"{field}.labels: {item.labels!r:.80} is no label set; there are {known}", param=f"{field}.labels"
        )
    given = [name for name in ("content", "messages", "prompt") if getattr(item, name) is not None]
    if len(given) != 1:
        raise RequestError(
            f"{field}: has {' and '.join(given) or 'none of content, messages, prompt'}; give exactly one", param=field
        )
    if item.prompt is None and prompts.template is None:
        raise Unsupported(f"{field}: this model has no chat template; give prompt instead", param=field)


def _item(
    position: int,
    item: LabelItemIn,
    call: LabelsIn,
    prompts: PromptBuilder,
    limits: ModelLimits,
    tails: dict[tuple[str, str], LabelTail],
) -> LabelItem:
    field = f"items[{position}]"
    if item.prompt is not None:
        text = item.prompt + call.cue
    else:
        own = item.messages or [MessageIn(role="user", content=item.content)]
        text = (prompts.render_open_turn if call.open_turn else prompts.render)(
            [*(call.messages or ()), *own]
        ) + call.cue
    head, tail = prompts.split_tail(text, call.cue if call.open_turn else "")
    labels = tails.get((tail, item.labels))
    if labels is None:
        labels = prompts.tokenize_labels(tail, call.label_sets[item.labels], ending=call.ending)
        _check_distinct(item.labels, call.label_sets[item.labels], labels.labels)
        if head:  # without control tokens the tail is the whole text and will hardly come twice
            tails[tail, item.labels] = labels
    prompt = [*prompts.tokenize_head(head, tail), *labels.prompt]
    if not prompt:
        raise RequestError(f"{field}: is empty and this model has no token to begin with; write something", param=field)
    check_length(len(prompt) + max(map(len, labels.labels)) - 1, limits, field)
    return LabelItem(
        prompt,
        labels.labels,
        join_cache_salt(call.cache_salt, call.prompt_cache_key),
        call.priority,
        tolerance=call.tolerance,
    )


def _check_distinct(name: str, labels: Sequence[str], tokens: Sequence[tuple[int, ...]]) -> None:
    seen: dict[tuple[int, ...], str] = {}
    for label, ids in zip(labels, tokens, strict=True):
        other = seen.setdefault(ids, label)
        if other is not label:
            field = f"label_sets.{name}"
            raise RequestError(
                f"{field}: the model reads {other!r:.80} and {label!r:.80} as the same; keep one", param=field
            )
