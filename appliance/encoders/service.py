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

from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.encoders.embedders import ONNX_MAX_TOKENS, STATIC_MAX_TOKENS
from appliance.encoders.load_report import EncoderLoadReport, SpeedMeter
from appliance.encoders.model_cache import ModelCache
from appliance.encoders.request_fields import (
    MAX_INPUTS,
    MAX_TEXTS,
    ThresholdRequest,
    parse_model_name,
    parse_texts,
    parse_threshold_request,
    parse_train_request,
    parse_version,
)
from appliance.encoders.shadow import Shadows
from appliance.encoders.store import ClassifierStore, check_name
from appliance.encoders.training.examples import read_examples
from appliance.encoders.training.jobs import TrainingJob, TrainingJobs, TrainingOrder
from appliance.encoders.training.metrics import build_report
from appliance.encoders.training.selective_risk import find_threshold, has_enough_rows, tabulate_bounds
from appliance.encoders.two_stage import ClassifierHead, StageAnswers
from appliance.errors import ApplianceError, RequestError
from appliance.worker.json_log import log
from appliance.worker.server import ActiveRequests

_CHARS_PER_TOKEN: Final = 4
"""Classifiers count no tokens; what they report is this estimate."""
_BATCH_TEXTS: Final = 512
_MIN_EXAMPLES: Final = 2
_SHORT_REPORT: Final = ("recipe", "tier", "accuracy", "macro_f1", "ece", "examples")
_SPEED_TEXTS: Final = ("Where is my parcel? It should have come on Monday.", "Please send the invoice again.") * 8
"""What the speed is measured on before anybody has asked: short texts in one call, as in everyday use."""

Floats = npt.NDArray[np.float32]


class EncoderService:
    """One for the program. Work of any length runs in threads; versions change on the event loop alone."""

    def __init__(self, *, data: Path, models: Path, threads: int) -> None:
        self.model_cache = ModelCache(models, threads)
        self.store = ClassifierStore(data)
        self.training_jobs = TrainingJobs(data, models, max(1, threads - 1), self._trained)
        self.shadows = Shadows(lambda head, texts: self._answers(head, texts).probabilities)
        self.speed = SpeedMeter()
        self._classified_batches = 0
        self.requests = ActiveRequests()
        self._heads: dict[str, tuple[int, ClassifierHead]] = {}
        self._loading = threading.Lock()
        self._speed_tried: Sequence[str] = ()
        """The names that were served when the speed was last measured without a request."""
        self._measuring: asyncio.Task[None] | None = None

    async def embed(self, body: JsonObject) -> bytes:
        """OpenAI's reply to an embeddings request, as JSON."""
        name, texts = parse_model_name(body), parse_texts(body, "input", MAX_INPUTS)
        encoding = body.get("encoding_format") or "float"
        return await asyncio.to_thread(self._embed, name, texts, body.get("dimensions"), encoding)

    def _embed(self, name: str, texts: Sequence[str], width: Any, encoding: str) -> bytes:
        model = self.model_cache.get_embedder(name)
        if width is not None and (type(width) is not int or not 1 <= width <= model.dimensions):
            raise RequestError(
                f"dimensions is {width!r}: {name} has {model.dimensions}, so from 1 to that", param="dimensions"
            )
        began = time.perf_counter()
        found = model.embed(texts)
        tokens = int(sum(found.tokens))
        self.speed.observe(tokens, time.perf_counter() - began)
        rows = found.vectors
        if width is not None and width < model.dimensions:
            rows = rows[:, :width] / np.maximum(np.linalg.norm(rows[:, :width], axis=1, keepdims=True), 1e-12)
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        data = [
            {"object": "embedding", "index": place, "embedding": _encoded(row, encoding)}
            for place, row in enumerate(rows)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        payload = {"object": "list", "data": data, "model": name, "usage": usage}
        return orjson.dumps(payload, option=orjson.OPT_SERIALIZE_NUMPY)

    async def classify(self, body: JsonObject) -> bytes:
        """Probabilities of every label for every text, as JSON. A shadow sees what the serving version answered."""
        name, texts = check_name(body.get("model")), parse_texts(body, "texts", MAX_TEXTS)
        version = parse_version(body.get("version"))
        payload, answers = await asyncio.to_thread(self._classify, name, version, texts)
        if version is None:
            self.shadows.observe(name, texts, answers)
        return payload

    def _classify(self, name: str, version: int | None, texts: Sequence[str]) -> tuple[bytes, Sequence[str]]:
        number, head = self._load_head(name, version)
        began = time.perf_counter()
        found = self._answers(head, texts)
        tokens = sum(len(text) // _CHARS_PER_TOKEN + 1 for text in texts)
        self.speed.observe(tokens, time.perf_counter() - began)
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
        for start in range(0, len(texts), _BATCH_TEXTS):
            parts.append(head.answer(texts[start : start + _BATCH_TEXTS]))
            self._classified_batches += 1
        return StageAnswers(
            np.vstack([part.probabilities for part in parts]),
            np.concatenate([part.ood_scores for part in parts]),
            np.concatenate([part.escalated for part in parts]),
        )

    def _load_head(self, name: str, version: int | None) -> tuple[int, ClassifierHead]:
        number = self.store.find_serving(name) if version is None else version
        kept = self._heads.get(name)
        if kept is not None and kept[0] == number:
            return kept
        with self._loading:
            head = self.store.load(name, number, self.model_cache.find_static(), self.model_cache.load_encoders())
            if version is None or self.store.find_serving(name) == number:
                self._heads[name] = (number, head)
            return number, head

    async def train(self, body: JsonObject) -> TrainingJob:
        """Start a training. What is wrong with the examples is said at once."""
        request = parse_train_request(body)
        given, format = body.get("examples"), body.get("format")
        if request.with_kept:
            given = await asyncio.to_thread(self._with_kept, request.name, given)
        found = await asyncio.to_thread(read_examples, given, format, request.labels, at_least=_MIN_EXAMPLES)
        if request.keep_examples:
            labels = [found.labels[place] for place in found.truth]
            await asyncio.to_thread(self.store.keep_examples, request.name, found.texts, labels)
        return self.training_jobs.start(
            TrainingOrder(
                name=request.name,
                texts=found.texts,
                truth=found.truth.tolist(),
                labels=found.labels,
                notes=found.notes,
                wanted_accuracy=request.wanted_accuracy,
                max_tier=request.max_tier,
                encoder=request.encoder,
                serve=request.serve,
            )
        )

    def _with_kept(self, name: str, given: Any) -> Any:
        """More examples together with those that were given and kept before. The newer label of a text counts."""
        if not isinstance(given, list):
            raise RequestError("with_kept adds to a list of {text, label}: give examples as one", param="examples")
        newer = {row.get("text") for row in given if isinstance(row, Mapping)}
        return [*(row for row in self.store.read_kept_examples(name) if row["text"] not in newer), *given]

    def _trained(self, job: TrainingJob) -> None:
        self._heads.pop(job.name, None)

    def list(self) -> Sequence[MutableJsonObject]:
        """Every classifier in short."""
        rows = []
        for name in self.store.list_names():
            facts, report = self._describe(name, None)
            rows.append({**facts, "labels": len(facts["labels"]), **{key: report[key] for key in _SHORT_REPORT}})
        return rows

    def show(self, name: str, version: int | None) -> MutableJsonObject:
        """One version of a classifier with its report; None: the one that serves."""
        facts, report = self._describe(name, version)
        job, shadow = self.training_jobs.find(name), self.shadows.get(name)
        training, shadowing = job and job.to_json(), shadow and shadow.to_json()
        return {**facts, "report": report, "training": training, "shadow": shadowing}

    def _describe(self, name: str, version: int | None) -> tuple[MutableJsonObject, JsonObject]:
        stored = self.store.describe(name, version)
        facts = {
            "name": name,
            "model": f"classifier/{name}",
            "version": stored.version,
            "serving": self.store.find_serving(name),
            "versions": self.store.list_versions(name),
            "made_at": stored.facts["made_at"],
            "labels": stored.facts["labels"],
        }
        return facts, stored.facts["report"]

    async def threshold(self, name: str, body: JsonObject) -> JsonObject:
        """From which confidence on answers may stand: by the held-out rows, and by labelled traffic."""
        return await asyncio.to_thread(self._threshold, check_name(name), parse_threshold_request(body))

    def _threshold(self, name: str, request: ThresholdRequest) -> JsonObject:
        number = self.store.find_serving(name) if request.version is None else request.version
        held = self.store.read_held_out(name, number)
        ood = held["strangeness"] > float(self.store.describe(name, number).facts["strange_from"])
        scores = np.where(ood, 0.0, held["confidence"]).tolist()
        held_out = list(zip(scores, held["right"].astype(bool).tolist(), strict=True))
        return {
            "version": number,
            "held_out": _threshold_json(request, held_out),
            "live": _threshold_json(request, request.live),
        }

    async def shadow(self, name: str, version: Any) -> JsonObject:
        """Have a version see what the serving one answers; None: no more."""
        wanted = parse_version(version)
        if wanted is None:
            self.shadows.stop(check_name(name))
            return {"name": name, "shadow": None}
        number, head = await asyncio.to_thread(self._load_head, check_name(name), wanted)
        return {"name": name, "shadow": self.shadows.start(name, number, head).to_json()}

    async def evaluate(self, name: str, body: JsonObject) -> JsonObject:
        """The serving version, or the one named, on labelled examples that it was not trained on."""
        return await asyncio.to_thread(self._evaluate, name, parse_version(body.get("version")), body)

    def _evaluate(self, name: str, version: int | None, body: JsonObject) -> JsonObject:
        number, head = self._load_head(name, version)
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

    def roll_back(self, name: str, version: Any) -> JsonObject:
        number = self.store.roll_back(check_name(name), parse_version(version))
        self._heads.pop(name, None)
        self.shadows.stop(name)
        return {"name": name, "serving": number, "versions": self.store.list_versions(name)}

    def remove_version(self, name: str, version: int) -> JsonObject:
        """One that does not serve."""
        self.store.remove_version(check_name(name), version)
        shadow = self.shadows.get(name)
        if shadow is not None and shadow.version == version:
            self.shadows.stop(name)
        return {"name": name, "removed": version}

    def remove(self, name: str) -> JsonObject:
        self.shadows.stop(name)
        running = self.training_jobs.find(name)
        if running is not None and running.state == "running":
            self.training_jobs.cancel(name)
        self.store.remove(check_name(name))
        self._heads.pop(name, None)
        return {"name": name, "removed": True}

    def list_models(self) -> Sequence[JsonObject]:
        return [
            {"id": name, "object": "model", "created": 0, "owned_by": "onsite", "kind": kind}
            for name, kind in self.model_cache.list_kinds().items()
        ]

    def list_served(self) -> JsonObject:
        """What the router may send here, by name."""
        models = [
            {"name": name, "max_tokens": ONNX_MAX_TOKENS if kind == "onnx" else STATIC_MAX_TOKENS}
            for name, kind in self.model_cache.list_kinds().items()
        ]
        return {
            "models": models,
            "classifiers": list(self.store.list_names()),
            "is_training": self.training_jobs.running is not None,
        }

    def report_load(self) -> EncoderLoadReport:
        speed = self.speed.tokens_per_second
        return EncoderLoadReport(
            running_sequences=self.requests.count,
            steps=self._classified_batches + self.model_cache.steps,
            prefill_tokens_total=self.speed.tokens_total,
            prefill_tokens_per_second=speed,
            decode_tokens_per_second={"1": speed} if speed else {},
        )

    def measure_speed_once(self) -> None:
        """Begin to measure the speed on texts of its own, while something is served and nobody has asked yet.

        An engine that was never measured counts as slow, and requests with a deadline would never come to measure it.
        """
        served = [*self.store.list_names(), *self.model_cache.list_kinds()]
        if served and served != self._speed_tried and not self.speed.tokens_per_second:
            self._speed_tried = served
            self._measuring = asyncio.create_task(self._measure_speed(served[0]), name="measure speed")

    async def wait_until_measured(self) -> None:
        if self._measuring is not None:
            await self._measuring

    async def _measure_speed(self, name: str) -> None:
        try:
            if name in self.store.list_names():
                await asyncio.to_thread(self._classify, name, None, _SPEED_TEXTS)
            else:
                await asyncio.to_thread(self._embed, name, _SPEED_TEXTS, None, "float")
        except ApplianceError as error:
            log("speed_not_measured", name=name, reason=error.message)


def _encoded(row: Floats, encoding: str) -> Any:
    return base64.b64encode(row.astype("<f4").tobytes()).decode() if encoding == "base64" else row


def _threshold_json(request: ThresholdRequest, rows: Sequence[tuple[float, bool]]) -> JsonObject:
    """The threshold by `rows` and the complaints, and whether so many rows could keep the bound at all."""
    bound, confidence, over_texts = request.bound, request.confidence, request.over_texts
    wrong = [(score, False) for score in request.complaints]
    try:
        found = find_threshold(bound, confidence, [*rows, *wrong], next_rows=over_texts)
    except ValueError as error:
        raise RequestError(str(error), param="bound") from error
    return {**asdict(found), "is_enough": has_enough_rows(len(rows), bound, confidence, next_rows=over_texts)}
