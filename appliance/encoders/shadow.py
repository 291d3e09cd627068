"""Candidates beside the serving version. They see the same texts after these were answered; how often they would have
answered otherwise is counted. Texts are not kept."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from appliance.encoders.two_stage import ClassifierHead
from appliance.errors import ApplianceError
from appliance.worker.json_log import log


@dataclass(slots=True)
class Shadow:
    """One candidate. `disagreed`: texts that it would have put under another label than the serving version did."""

    version: int
    head: ClassifierHead
    texts: int = 0
    disagreed: int = 0

    def to_json(self) -> Mapping[str, int]:
        return {"version": self.version, "texts": self.texts, "disagreed": self.disagreed}


class Shadows:
    """On the event loop. One batch at a time is computed, in a thread; what comes meanwhile is not looked at."""

    def __init__(self, scores: Callable[[ClassifierHead, Sequence[str]], npt.NDArray[np.float32]]) -> None:
        self._scores = scores
        self._of: dict[str, Shadow] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self, name: str, version: int, head: ClassifierHead) -> Shadow:
        shadow = self._of[name] = Shadow(version, head)
        return shadow

    def stop(self, name: str) -> None:
        self._of.pop(name, None)

    def get(self, name: str) -> Shadow | None:
        return self._of.get(name)

    def observe(self, name: str, texts: Sequence[str], answers: Sequence[str]) -> None:
        """Texts that the serving version has answered."""
        shadow = self._of.get(name)
        if shadow is not None and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._look(shadow, texts, answers), name=f"shadow of {name}")

    async def idle(self) -> None:
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def _look(self, shadow: Shadow, texts: Sequence[str], answers: Sequence[str]) -> None:
        try:
            scores = await asyncio.to_thread(self._scores, shadow.head, texts)
        except ApplianceError as error:
            log("shadow_failed", version=shadow.version, reason=error.message)
            return
        chosen = [shadow.head.labels[place] for place in scores.argmax(axis=1)]
        shadow.texts += len(texts)
        shadow.disagreed += sum(ours != theirs for ours, theirs in zip(chosen, answers, strict=True))
