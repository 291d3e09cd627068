"""Learning over a real encoder program, with traffic as tests want it."""

import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from appliance.config import CascadeRule, Policy, RouteRule
from appliance.config import LearningSettings as LearningRules
from appliance.encoders.server import EncoderEndpoints, make_app
from appliance.encoders.service import EncoderService
from appliance.quality.learning import CascadeLearning
from appliance.quality.store import LearningStore
from appliance.quality.traffic import find_cascade_classifiers
from appliance.tasks.classify.cascade import CascadeCall, CascadeText, CascadeThresholds

TARGET = "classifier/mail"
_ids = itertools.count(1)


@dataclass(frozen=True)
class Told:
    status: int
    body: bytes
    retry_after: str | None = None


@dataclass
class School:
    """`say` sets the policy's cascade; `client` is the encoder program's own API."""

    home: Path
    desk: EncoderService
    client: httpx.AsyncClient
    learning: CascadeLearning = field(init=False)
    policy: Policy = field(init=False)
    alerts: dict[str, str] = field(default_factory=dict)
    now: float = 1_700_000_000.0
    is_served: bool = False
    """Whether the node's rows have the classifier."""

    def say(self, *, keep_texts: bool = True, **cascade: Any) -> CascadeRule:
        made = CascadeRule(**{"bound": 0.05, "over_texts": 0, **cascade})
        route = RouteRule(name="intents", targets=(TARGET, "hosted"), cascade=made, keep_texts=keep_texts)
        self.policy = Policy(routes=(route,))
        return made

    @property
    def cascade(self) -> CascadeRule:
        cascade = self.policy.routes[0].cascade
        assert cascade is not None
        return cascade

    async def ask(self, method: str, path: str, body: bytes = b"") -> Told:
        response = await self.client.request(method, path, content=body)
        return Told(response.status_code, response.content)

    def warn(self, code: str, text: str, about: str = "") -> None:
        self.alerts[code] = text

    def clear(self, code: str, about: str = "") -> None:
        self.alerts.pop(code, None)

    def standing(self, version: int = 1) -> CascadeThresholds:
        return self.learning.get_thresholds(self.cascade, TARGET, str(version))

    async def train(self, examples: Sequence[Mapping[str, str]], **more: Any) -> None:
        body = {"name": "mail", "examples": list(examples), "keep_examples": True, **more}
        begun = await self.client.post("/v1/classifiers", json=body)
        assert begun.status_code == 202, begun.text
        await self.trained()

    async def trained(self) -> None:
        """Wait for the training's process to end."""
        await self.desk.training_jobs.wait_until_idle()

    async def shown(self, texts: Sequence[str]) -> None:
        """Traffic at the program itself, seen by a candidate too."""
        await self.client.post("/v1/classify", json={"model": "mail", "texts": list(texts)})
        await self.desk.shadows.idle()

    def see(self, *rows: CascadeText, owner: str = "key-1", residency: str = "any", version: str | None = "1") -> str:
        """Traffic; the id of its decision."""
        decision_id = f"dec_{next(_ids)}"
        keeps = self.policy.routes[0].keep_texts
        call = CascadeCall("intents", TARGET, version, decision_id, owner, residency, keeps, self.now, rows)
        self.learning.record_cascade(call)
        return decision_id


def labelled_by(target: str, text: str, label: str, own: str | None, sure: float = 0.4, **more: Any) -> CascadeText:
    given: dict[str, Any] = {"index": 0, "is_sure": True, "went_on": True, "audited": False, "is_reference": True}
    return CascadeText(
        text=text, own=own, classifier_confidence=sure, answer=label, answered_by=target, **{**given, **more}
    )


def stood(text: str, label: str, sure: float, index: int = 0) -> CascadeText:
    """The classifier's own answer."""
    return labelled_by(TARGET, text, label, label, sure, index=index, went_on=False, is_reference=False)


def audited(text: str, label: str, own: str, sure: float) -> CascadeText:
    return labelled_by("cloud/big", text, label, own, sure, audited=True)


@asynccontextmanager
async def school(home: Path, **rules: Any) -> AsyncIterator[School]:
    desk = EncoderService(data=home / "classifiers", models=home / "models", threads=1)
    transport = httpx.ASGITransport(make_app(EncoderEndpoints(desk)))
    async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:
        made = School(home, desk, client)
        made.say()
        store = await LearningStore.open(home / "learning.sqlite")
        lessons = lambda: find_cascade_classifiers(made.policy)  # noqa: E731 - it reads what a test sets
        made.learning = CascadeLearning(
            store, made, lessons, made, LearningRules(**rules), lambda: made.now, lambda name: made.is_served
        )
        await made.learning.start()
        try:
            yield made
        finally:
            await made.learning.aclose()
            await desk.shadows.idle()
            await desk.training_jobs.aclose()
