"""New versions of a classifier: trained beside the serving one, compared with it on texts that neither has seen, shown
real traffic in shadow, and let serve only when they are better."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, cast
from urllib.parse import quote

import orjson

from appliance.config import CascadeRule
from appliance.core import HealthAlerts
from appliance.core.json_types import JsonObject
from appliance.errors import Busy, RequestError, Unavailable
from appliance.quality import rules
from appliance.quality.models import (
    ClassifierReply,
    Labelled,
    LearningState,
    ShadowReply,
    ThresholdReply,
    TrainingReply,
)
from appliance.quality.store import LearningStore

_TEXTS_AT_ONCE: Final = 1_000
_MOST_NEWS: Final = 20


class EncoderReply(Protocol):
    @property
    def status(self) -> int: ...

    @property
    def body(self) -> bytes: ...

    @property
    def retry_after(self) -> str | None: ...


class EncoderClient(Protocol):
    """The program that trains and keeps classifiers."""

    async def ask(self, method: str, path: str, body: bytes = b"") -> EncoderReply: ...


@dataclass(frozen=True, slots=True)
class CascadeClassifier:
    """A classifier that a route's cascade begins with, and what the route says of it."""

    name: str
    """Without `classifier/`."""
    route: str
    cascade: CascadeRule
    keep_texts: bool

    @property
    def target(self) -> str:
        return f"classifier/{self.name}"


class CandidateProgram:
    """The encoder program's own API, as far as learning needs it. Raises what it refuses as the error that it is."""

    def __init__(self, encoders: EncoderClient) -> None:
        self._encoders = encoders

    async def get_classifier(self, name: str) -> ClassifierReply | None:
        """None where no such classifier serves."""
        status, found = await self._ask("GET", _path(name))
        return None if status == 404 else cast(ClassifierReply, _check_reply(status, found))

    async def train_candidate(self, name: str, examples: Sequence[Mapping[str, str]], *, serve: bool) -> None:
        body = {"name": name, "examples": examples, "with_kept": True, "serve": serve}
        _check_reply(*await self._ask("POST", "/v1/classifiers", body))

    async def get_training(self, name: str) -> TrainingReply | None:
        status, found = await self._ask("GET", f"{_path(name)}/training")
        return None if status == 404 else cast(TrainingReply, _check_reply(status, found))

    async def estimate_threshold(self, name: str, body: JsonObject) -> ThresholdReply:
        return cast(ThresholdReply, _check_reply(*await self._ask("POST", f"{_path(name)}/threshold", body)))

    async def start_shadow(self, name: str, version: int) -> None:
        _check_reply(*await self._ask("POST", f"{_path(name)}/shadow", {"version": version}))

    async def promote_version(self, name: str, version: int) -> None:
        _check_reply(*await self._ask("POST", f"{_path(name)}/rollback", {"version": version}))

    async def remove_version(self, name: str, version: int) -> None:
        _check_reply(*await self._ask("DELETE", f"{_path(name)}?version={version}"))

    async def classify_texts(self, name: str, version: int, texts: Sequence[str]) -> Sequence[str]:
        """The label of each text, as one version has it."""
        found: list[str] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            body = {"model": name, "version": version, "texts": texts[start : start + _TEXTS_AT_ONCE]}
            reply = _check_reply(*await self._ask("POST", "/v1/classify", body))
            found += [reply["labels"][max(range(len(row)), key=row.__getitem__)] for row in reply["probabilities"]]
        return found

    async def _ask(self, method: str, path: str, body: JsonObject | None = None) -> tuple[int, Any]:
        found = await self._encoders.ask(method, path, b"" if body is None else orjson.dumps(body))
        return found.status, orjson.loads(found.body)


def _path(name: str) -> str:
    return f"/v1/classifiers/{quote(name, safe='')}"


def _check_reply(status: int, found: Any) -> JsonObject:
    if status < 400:
        good: JsonObject = found
        return good
    message = str(found.get("error", {}).get("message", found) if isinstance(found, dict) else found)
    if status == 429:
        raise Busy(message, retry_after_seconds=10)
    if status < 500:
        raise RequestError(message, status=status)
    raise Unavailable(message, retry_after_seconds=5)


class Candidates:
    """`tend` looks at one classifier and takes the next step, if there is one to take."""

    def __init__(self, store: LearningStore, program: CandidateProgram, alerts: HealthAlerts) -> None:
        self._store, self._program, self._alerts = store, program, alerts

    async def advance(self, classifier: CascadeClassifier, state: LearningState) -> LearningState:
        match state.phase:
            case "training":
                return await self._finish_training(classifier, state)
            case "shadow":
                return await self._compare_in_shadow(classifier, state)
            case _:
                counts = await self._store.count_labels(classifier.target)
                due = rules.is_training_due(counts["texts"], state.examples_trained, classifier.cascade.learn_after)
                return await self._start_if_possible(classifier, state, counts["texts"]) if due else state

    async def start_training(self, classifier: CascadeClassifier, state: LearningState) -> LearningState:
        """Train a candidate now. Raises RequestError for what is missing, and Busy while another training runs."""
        if state.phase != "idle":
            raise Busy(f"{classifier.target} is learning already ({state.phase})", retry_after_seconds=10)
        rows = await self._rows(classifier)
        if rows is None:
            raise RequestError(_mixed_keys_message(classifier))
        return await self._train(classifier, state, rows)

    async def _start_if_possible(
        self, classifier: CascadeClassifier, state: LearningState, texts: int
    ) -> LearningState:
        rows = await self._rows(classifier)
        if rows is None:
            self._alerts.warn("learning_mixed_keys", _mixed_keys_message(classifier), classifier.route)
            return state
        self._alerts.clear("learning_mixed_keys", classifier.route)
        try:
            return await self._train(classifier, state, rows)
        except Busy:
            return state
        except RequestError as error:
            # Too few of a label, for example: with more examples it may be tried again.
            return _with_news(replace(state, examples_trained=texts), f"not trained: {error.message}")

    async def _rows(self, classifier: CascadeClassifier) -> Sequence[Labelled] | None:
        owners = await self._store.list_owners(classifier.target)
        chosen = rules.select_owners(owners, classifier.cascade.learn_from)
        return None if chosen is None else await self._store.list_texts(classifier.target, chosen)

    async def _train(
        self, classifier: CascadeClassifier, state: LearningState, rows: Sequence[Labelled]
    ) -> LearningState:
        serving = await self._program.get_classifier(classifier.name)
        labels = None if serving is None else serving["labels"]
        latest = {row.text: row.label for row in rows if row.text is not None}
        examples = rules.select_examples(list(latest.items()), labels)
        if not examples:
            raise RequestError(f"{classifier.target} has no labelled texts to learn from yet: keep_texts, and wait")
        await self._program.train_candidate(classifier.name, examples, serve=serving is None)
        counts = await self._store.count_labels(classifier.target)
        begun = replace(state, phase="training", candidate=None, tests=0, tested_rows=0)
        return _with_news(
            replace(begun, examples_trained=counts["texts"]), f"training on {len(examples)} texts from traffic"
        )

    async def _finish_training(self, classifier: CascadeClassifier, state: LearningState) -> LearningState:
        run = await self._program.get_training(classifier.name)
        if run is not None and run["state"] == "running":
            return state
        idle = replace(state, phase="idle")
        if run is None or run["state"] != "done" or run["version"] is None:
            reason = "the node was restarted" if run is None else run["error"] or run["state"]
            return _with_news(idle, f"the training came to nothing: {reason}")
        version = run["version"]
        found = await self._program.get_classifier(classifier.name)
        if found is None or found["serving"] == version:
            return _with_news(idle, f"version {version} serves, the first one")
        await self._program.start_shadow(classifier.name, version)
        return _with_news(replace(state, phase="shadow", candidate=version), f"version {version} is seen in shadow")

    async def _compare_in_shadow(self, classifier: CascadeClassifier, state: LearningState) -> LearningState:
        assert state.candidate is not None
        found = await self._program.get_classifier(classifier.name)
        if found is None or state.candidate not in found["versions"] or found["serving"] == state.candidate:
            return _with_news(replace(state, phase="idle", candidate=None), "the candidate was taken away")
        shadow = found["shadow"]
        if shadow is None or shadow["version"] != state.candidate:
            await self._program.start_shadow(classifier.name, state.candidate)
            return state
        rows = [row for row in await self._rows(classifier) or () if row.text and rules.is_for_testing(row.text)]
        if not rules.is_test_due(len(rows), state.tested_rows, shadow["texts"]):
            return state
        match = await self._compare_versions(classifier, rows, found["serving"], state.candidate)
        state = replace(state, tests=state.tests + 1, tested_rows=len(rows))
        return await self._apply_verdict(classifier, state, match, shadow)

    async def _compare_versions(
        self, classifier: CascadeClassifier, rows: Sequence[Labelled], serving: int, candidate: int
    ) -> rules.CandidateComparison:
        texts = [row.text or "" for row in rows]
        return rules.compare_candidates(
            [row.label for row in rows],
            await self._program.classify_texts(classifier.name, serving, texts),
            await self._program.classify_texts(classifier.name, candidate, texts),
            [row.audited for row in rows],
        )

    async def _apply_verdict(
        self,
        classifier: CascadeClassifier,
        state: LearningState,
        match: rules.CandidateComparison,
        shadow: ShadowReply,
    ) -> LearningState:
        version = state.candidate
        assert version is not None
        beside = f"{match}; in shadow it differed on {shadow['disagreed']} of {shadow['texts']} texts"
        ended = replace(state, phase="idle", candidate=None)
        match rules.judge_candidate(match, state.tests):
            case "promote":
                await self._program.promote_version(classifier.name, version)
                return _with_news(ended, f"version {version} serves: {beside}")
            case "reject":
                await self._program.remove_version(classifier.name, version)
                return _with_news(ended, f"version {version} is no better and was removed: {beside}")
        return _with_news(state, f"version {version} is not known to be better yet: {beside}")


def _with_news(state: LearningState, text: str) -> LearningState:
    return replace(state, news=(text, *state.news)[:_MOST_NEWS])


def _mixed_keys_message(classifier: CascadeClassifier) -> str:
    return (
        f"texts of several keys came by route {classifier.route!r}, and nobody said that {classifier.target} may learn "
        "from them together: name the keys in cascade.learn_from"
    )
