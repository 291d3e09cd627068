"""What the program does for a request, apart from HTTP: embed, classify, train, and look after versions."""

import asyncio
import base64
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from appliance.encoders.embedders import ONNX_MAX_TOKENS, STATIC_MAX_TOKENS
from appliance.encoders.linear_models import TIERS
from appliance.encoders.model_cache import ModelCache
from appliance.encoders.shadow import Shadows
from appliance.encoders.training.examples import read_examples
from appliance.encoders.training.jobs import TrainingJob, TrainingJobs
from appliance.encoders.training.metrics import build_report
from appliance.encoders.training.selective_risk import RiskThreshold, find_threshold, has_enough_rows, tabulate_bounds
from appliance.encoders.two_stage import ClassifierHead, StageAnswers
from appliance.encoders.versions import ClassifierStore, check_name
from appliance.errors import RequestError
from appliance.worker.server import ActiveRequests

MAX_TEXTS: Final = 10_000
MAX_INPUTS: Final = 2_048
_CHARS_PER_TOKEN: Final = 4
"""Heads count no tokens; what they report is this estimate."""
_BATCH: Final = 512
_MIN_EXAMPLES: Final = 2

Floats = npt.NDArray[np.float32]


class EncoderService:
    """One for the program. Work of any length runs in threads; versions change on the event loop alone."""

    def __init__(self, *, data: Path, models: Path, threads: int) -> None:
        self.model_cache = ModelCache(models, threads)
        self.store = ClassifierStore(data)
        self.training_jobs = TrainingJobs(data, models, max(1, threads - 1), self._trained)
        self.shadows = Shadows(lambda head, texts: self._answers(head, texts).probabilities)
        self.classified_batches = 0
        self.tokens_total = 0
        self.requests = ActiveRequests()
        self._heads: dict[str, tuple[int, ClassifierHead]] = {}
        self._loading = threading.Lock()

    async def embed(self, body: Mapping[str, Any]) -> bytes:
        name, texts = _text_of(body, "model"), _texts(body.get("input"), "input", MAX_INPUTS)
        width = body.get("dimensions")
        encoding = body.get("encoding_format") or "float"
        return await asyncio.to_thread(self._embed, name, texts, width, encoding)

    def _embed(self, name: str, texts: Sequence[str], width: Any, encoding: str) -> bytes:
        model = self.model_cache.get_embedder(name)
        if width is not None and (type(width) is not int or not 1 <= width <= model.dimensions):
            raise RequestError(
                f"dimensions is {width!r}: {name} has {model.dimensions}, so from 1 to that", param="dimensions"
            )
        found = model.embed(texts)
        rows = found.vectors
        if width is not None and width < model.dimensions:
            rows = rows[:, :width] / np.maximum(np.linalg.norm(rows[:, :width], axis=1, keepdims=True), 1e-12)
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        data = [
            {"object": "embedding", "index": place, "embedding": _encoded(row, encoding)}
            for place, row in enumerate(rows)
        ]
        tokens = int(sum(found.tokens))
        self.tokens_total += tokens
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        payload = {"object": "list", "data": data, "model": name, "usage": usage}
        return orjson.dumps(payload, option=orjson.OPT_SERIALIZE_NUMPY)

    async def classify(self, body: Mapping[str, Any]) -> bytes:
        name, texts = check_name(body.get("model")), _texts(body.get("texts"), "texts", MAX_TEXTS)
        payload, answers = await asyncio.to_thread(self._classify, name, body.get("version"), texts)
        if body.get("version") is None:
            self.shadows.observe(name, texts, answers)
        return payload

    def _classify(self, name: str, version: Any, texts: Sequence[str]) -> tuple[bytes, Sequence[str]]:
        number, head = self._head(name, version)
        found = self._answers(head, texts)
        tokens = sum(len(text) // _CHARS_PER_TOKEN + 1 for text in texts)
        self.tokens_total += tokens
        payload = {
            "model": name,
            "version": number,
            "labels": head.labels,
            "probabilities": np.ascontiguousarray(found.probabilities),
            "out_of_scope": np.ascontiguousarray(found.ood_scores - np.float32(head.ood_threshold)),
            "encoder_asked": int(found.escalated.sum()),
            "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
        }
        answers = [head.labels[place] for place in found.probabilities.argmax(axis=1)] if self.shadows.get(name) else ()
        return orjson.dumps(payload, option=orjson.OPT_SERIALIZE_NUMPY), answers

    def _answers(self, head: ClassifierHead, texts: Sequence[str]) -> StageAnswers:
        parts = []
        for start in range(0, len(texts), _BATCH):
            parts.append(head.answer(texts[start : start + _BATCH]))
            self.classified_batches += 1
        return StageAnswers(
            np.vstack([part.probabilities for part in parts]),
            np.concatenate([part.ood_scores for part in parts]),
            np.concatenate([part.escalated for part in parts]),
        )

    def _head(self, name: str, version: Any) -> tuple[int, ClassifierHead]:
        number = self.store.find_serving(name) if version is None else _whole(version)
        kept = self._heads.get(name)
        if kept is not None and kept[0] == number:
            return kept
        with self._loading:
            head = self.store.load(name, number, self.model_cache.find_static(), self.model_cache.load_encoders())
            if version is None or self.store.find_serving(name) == number:
                self._heads[name] = (number, head)
            return number, head

    async def train(self, body: Mapping[str, Any]) -> TrainingJob:
        """Start a training. What is wrong with the examples is said at once."""
        name = check_name(body.get("name"))
        wanted, dearest = body.get("accuracy"), body.get("tier", TIERS[-1])
        if wanted is not None and (type(wanted) not in (int, float) or not 0 < wanted < 1):
            raise RequestError(f"accuracy is {wanted!r}: it must be a number between 0 and 1", param="accuracy")
        if dearest not in TIERS:
            raise RequestError(f"tier is {str(dearest)[:40]!r}: it must be {' or '.join(TIERS)}", param="tier")
        labels = _labels(body.get("labels"))
        given, format = body.get("examples"), body.get("format")
        if _flag(body, "with_kept"):
            given = await asyncio.to_thread(self._with_kept, name, given)
        found = await asyncio.to_thread(read_examples, given, format, labels, at_least=_MIN_EXAMPLES)
        if _flag(body, "keep_examples"):
            await asyncio.to_thread(
                self.store.keep_examples, name, found.texts, [found.labels[at] for at in found.truth]
            )
        job = {
            "serve": _flag(body, "serve", usual=True),
            "name": name,
            "texts": found.texts,
            "truth": found.truth.tolist(),
            "labels": found.labels,
            "notes": found.notes,
            "wanted_accuracy": wanted,
            "dearest": dearest,
            "encoder": body.get("encoder"),
        }
        return self.training_jobs.start(name, job)

    def _with_kept(self, name: str, given: Any) -> Any:
        """More examples together with those that were given and kept before. The newer label of a text counts."""
        if not isinstance(given, list):
            raise RequestError("with_kept adds to a list of {text, label}: give examples as one", param="examples")
        newer = {row.get("text") for row in given if isinstance(row, Mapping)}
        return [*(row for row in self.store.read_kept_examples(name) if row["text"] not in newer), *given]

    def _trained(self, run: TrainingJob) -> None:
        self._heads.pop(run.name, None)

    def list(self) -> Sequence[Mapping[str, Any]]:
        return [self.show(name, None, short=True) for name in self.store.list_names()]

    def show(self, name: str, version: int | None, *, short: bool = False) -> Mapping[str, Any]:
        stored = self.store.describe(name, version)
        serving, run = self.store.find_serving(name), self.training_jobs.find(name)
        told = stored.facts["report"]
        facts: dict[str, Any] = {
            "name": name,
            "model": f"classifier/{name}",
            "version": stored.version,
            "serving": serving,
            "versions": self.store.list_versions(name),
            "made_at": stored.facts["made_at"],
            "labels": stored.facts["labels"],
        }
        if short:
            shown = ("recipe", "tier", "accuracy", "macro_f1", "ece", "examples")
            return {**facts, "labels": len(facts["labels"]), **{key: told[key] for key in shown}}
        shadow = self.shadows.get(name)
        return {
            **facts,
            "report": told,
            "training": None if run is None else run.facts(),
            "shadow": None if shadow is None else shadow.facts(),
        }

    async def threshold(self, name: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """From which confidence on answers may stand: by the held-out rows, and by labelled traffic.

        `live` rows [confidence, right] are a random sample of it; `complaints` are confidences of answers that somebody
        said were wrong: no sample, so they only count against. `over_texts` 0: the bound is for the long run.
        """
        return await asyncio.to_thread(self._threshold, check_name(name), body)

    def _threshold(self, name: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        bound, confidence = body.get("bound"), body.get("confidence")
        if not isinstance(bound, float) or not isinstance(confidence, float):
            raise RequestError("bound and confidence must be numbers between 0 and 1", param="bound")
        next_rows = body.get("over_texts") or None
        number = self.store.find_serving(name) if body.get("version") is None else _whole(body["version"])
        wrong = [(float(score), False) for score in body.get("complaints") or ()]
        live = [(float(score), bool(right)) for score, right in body.get("live") or ()]
        held = self.store.read_held_out(name, number)
        strange = held["strangeness"] > float(self.store.describe(name, number).facts["strange_from"])
        scores = np.where(strange, 0.0, held["confidence"]).tolist()
        rows = list(zip(scores, held["right"].astype(bool).tolist(), strict=True))
        try:
            by_held_out = find_threshold(bound, confidence, rows + wrong, next_rows=next_rows)
            by_live = find_threshold(bound, confidence, live + wrong, next_rows=next_rows)
        except ValueError as error:
            raise RequestError(str(error), param="bound") from error
        enough = has_enough_rows(len(live), bound, confidence, next_rows=next_rows)
        return {
            "version": number,
            "held_out": _threshold_facts(
                by_held_out, has_enough_rows(len(rows), bound, confidence, next_rows=next_rows)
            ),
            "live": _threshold_facts(by_live, enough),
        }

    async def shadow(self, name: str, version: Any) -> Mapping[str, Any]:
        """Have a version see what the serving one answers; None: no more."""
        if version is None:
            self.shadows.stop(check_name(name))
            return {"name": name, "shadow": None}
        number, head = await asyncio.to_thread(self._head, check_name(name), version)
        self.shadows.start(name, number, head)
        return {"name": name, "shadow": {"version": number, "texts": 0, "disagreed": 0}}

    async def evaluate(self, name: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The serving version, or the one named, on labelled examples that it was not trained on."""
        return await asyncio.to_thread(self._evaluate, name, body)

    def _evaluate(self, name: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        number, head = self._head(name, body.get("version"))
        examples = read_examples(body.get("examples"), body.get("format"), head.labels)
        began = time.monotonic()
        found = self._answers(head, examples.texts)
        seconds = time.monotonic() - began
        shares = found.probabilities
        right = shares.argmax(axis=1) == examples.truth
        return {
            "name": name,
            "version": number,
            **build_report(shares, examples.truth, head.labels),
            "bounds": tabulate_bounds(shares.max(axis=1), right),
            "out_of_scope_share": float((found.ood_scores > head.ood_threshold).mean()),
            "asked_share": float(found.escalated.mean()) if head.first.encoder is None else 1.0,
            "texts_per_second": len(examples.texts) / max(seconds, 1e-9),
            "notes": list(examples.notes),
        }

    def roll_back(self, name: str, version: Any) -> Mapping[str, Any]:
        number = self.store.roll_back(check_name(name), None if version is None else _whole(version))
        self._heads.pop(name, None)
        self.shadows.stop(name)
        return {"name": name, "serving": number, "versions": self.store.list_versions(name)}

    def remove_version(self, name: str, version: int) -> Mapping[str, Any]:
        """One that does not serve."""
        self.store.remove_version(check_name(name), version)
        shadow = self.shadows.get(name)
        if shadow is not None and shadow.version == version:
            self.shadows.stop(name)
        return {"name": name, "removed": version}

    def remove(self, name: str) -> Mapping[str, Any]:
        self.shadows.stop(name)
        running = self.training_jobs.find(name)
        if running is not None and running.state == "running":
            self.training_jobs.cancel(name)
        self.store.remove(check_name(name))
        self._heads.pop(name, None)
        return {"name": name, "removed": True}

    def models(self) -> Sequence[Mapping[str, Any]]:
        return [
            {"id": name, "object": "model", "created": 0, "owned_by": "onsite", "kind": kind}
            for name, kind in self.model_cache.list_kinds().items()
        ]

    def served(self) -> Mapping[str, Any]:
        models = [
            {"name": name, "max_tokens": ONNX_MAX_TOKENS if kind == "onnx" else STATIC_MAX_TOKENS}
            for name, kind in self.model_cache.list_kinds().items()
        ]
        return {
            "models": models,
            "classifiers": list(self.store.list_names()),
            "is_training": self.training_jobs.running is not None,
        }

    def load(self) -> Mapping[str, Any]:
        """What the CPU engine's `/load` tells, in the terms of a program that keeps no cache and writes no tokens."""
        return {
            "queued_requests": 0,
            "running_sequences": self.requests.count,
            "sequences_capacity": _CAPACITY,
            "queued_prompt_tokens": 0,
            "remaining_output_tokens": 0,
            "kv_used_tokens": 0,
            "kv_cached_tokens": 0,
            "kv_capacity_tokens": _ROOM_TOKENS,
            "steps": self.classified_batches + self.model_cache.steps,
            "prefill_tokens_total": self.tokens_total,
            "decode_tokens_total": 0,
            "prefill_tokens_per_second": _TOKENS_PER_SECOND,
            "decode_tokens_per_second": {"1": _TOKENS_PER_SECOND},
        }


_CAPACITY: Final = 16
_ROOM_TOKENS: Final = 1_000_000_000
_TOKENS_PER_SECOND: Final = 100_000.0
"""A prior: the router corrects it for each model by what it sees."""


def _encoded(row: Floats, encoding: str) -> Any:
    return base64.b64encode(row.astype("<f4").tobytes()).decode() if encoding == "base64" else row


def _threshold_facts(found: RiskThreshold, enough: bool) -> Mapping[str, Any]:
    return {**asdict(found), "is_enough": enough}


def _flag(body: Mapping[str, Any], field: str, *, usual: bool = False) -> bool:
    value = body.get(field)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{field} is {value!r:.40}: it must be true or false", param=field)
    return usual if value is None else value


def _text_of(body: Mapping[str, Any], field: str) -> str:
    value = body.get(field)
    if not isinstance(value, str) or not value:
        raise RequestError(f"{field} is {value!r:.40}: it must be a name", param=field)
    return value


def _texts(given: Any, field: str, most: int) -> Sequence[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise RequestError(f"{field} must be a text or a list of 1 to {most} texts", param=field)
    if len(texts) > most:
        raise RequestError(f"{field} has {len(texts)} texts: at most {most} in one call", param=field)
    return texts


def _labels(given: Any) -> Sequence[str] | None:
    if given is None:
        return None
    if not isinstance(given, list) or not all(isinstance(label, str) and label.strip() for label in given):
        raise RequestError("labels must be a list of names", param="labels")
    return [label.strip() for label in given]


def _whole(version: Any) -> int:
    if type(version) is not int or version < 1:
        raise RequestError(f"version is {version!r:.40}: it must be a whole number from 1", param="version")
    return version
