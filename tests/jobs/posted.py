"""A desk over a real pipeline and doors, with a provider that takes batches and an engine that is nowhere."""

import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appliance.api.auth import Authenticator
from appliance.config import JobsSettings, KeySettings, Provider, ProviderModel
from appliance.config.settings import NodeConfig
from appliance.config.targets import list_provider_targets
from appliance.core import Target
from appliance.errors import BudgetExceeded
from appliance.jobs.lines.executor import LineExecutor
from appliance.jobs.lines.requests import LineRequests
from appliance.jobs.manager import JobManager, new_batch_id
from appliance.jobs.models import Batch, StoredFile
from appliance.jobs.provider.lines import ProviderLines
from appliance.jobs.storage.files import new_file_id
from appliance.tasks.calibration_store import TaskCalibrationStore
from tests.jobs.office import Alerts, Answers
from tests.router.scene import RecordingLedger, Scene, engine_target

HOSTED_FIRST = """
[defaults]
total_seconds = 20.0

[[routes]]
name = "bound"
match = { prompt_tokens_at_least = 300 }
residency = "onsite"
targets = ["hosted", "onsite"]

[[routes]]
name = "general"
targets = ["hosted", "onsite"]
"""
LOCAL_FIRST = HOSTED_FIRST.replace('targets = ["hosted", "onsite"]\n', 'targets = ["onsite", "hosted"]\n')
CHAT = "/v1/chat/completions"
WEEK = 7 * 86_400.0


class Ledger(RecordingLedger):
    """The first settlement of a reservation stands, as in the real one. `limit_usd`: what may be reserved in all."""

    limit_usd = float("inf")

    async def reserve(self, **fields: Any) -> str:
        if sum(usd for _, usd in self.reserved.values()) + fields["usd"] > self.limit_usd:
            raise BudgetExceeded("today's budget is spent")
        reservation = f"res-{len(self.reserved) + 1}"
        self.reserved[reservation] = (fields["target"].name, fields["usd"])
        return reservation

    def settle(self, reservation_id: str, *, usd: float) -> None:
        if reservation_id not in self.settled:
            super().settle(reservation_id, usd=usd)


def provider_rows(address: str, kind: Any = "openai", discount: float | None = 0.5, **more: Any) -> tuple[Target, ...]:
    model = ProviderModel(name="big", input_usd=2.0, output_usd=8.0, batch_discount=discount, abilities=("chat",))
    provider = Provider(name="cloud", kind=kind, base_url=address, models=(model,), key_env="NONE", **more)
    return list_provider_targets(NodeConfig(providers=(provider,)))


@dataclass
class PostOffice:
    """What a test may change before it opens `desk`."""

    home: Path
    address: str
    kind: Any = "openai"
    policy: str = HOSTED_FIRST
    discount: float | None = 0.5
    config: JobsSettings = field(default_factory=lambda: JobsSettings(min_free_bytes=1000))
    wall: float = 1_800_000_000.0
    clock: float = 100.0
    ledger: Ledger = field(default_factory=Ledger)
    region: str | None = None
    engine: bool = False
    scene: Any = None
    answers: Answers | None = None
    """Instead of the pipeline, for lines that are asked the usual way."""
    keys: tuple[KeySettings, ...] = (KeySettings(name="k", sha256=hashlib.sha256(b"key").hexdigest()),)

    @asynccontextmanager
    async def desk(self) -> AsyncIterator[JobManager]:
        targets = provider_rows(self.address, self.kind, self.discount, region=self.region)
        scene = Scene(*targets, *((engine_target(),) if self.engine else ()), policy=self.policy)
        scene.ledger = self.ledger
        scene.reload(self.policy)
        self.scene = scene
        requests = LineRequests(Authenticator(self.keys, host="127.0.0.1"), TaskCalibrationStore())
        lines = LineExecutor(requests, lambda: scene.pipeline)
        desk = await JobManager.open(
            self.config,
            self.home,
            line_handler=self.answers or lines,
            state=scene.state,
            alerts=Alerts(),
            clock=lambda: self.clock,
            wall_clock=lambda: self.wall,
            provider_lines=ProviderLines(requests, lambda: scene.pipeline),
        )
        await desk.start()
        try:
            yield desk
        finally:
            await desk.aclose()
            await scene.aclose()

    async def batch(self, desk: JobManager, lines: Sequence[str], seconds: float = WEEK, **more: Any) -> Batch:
        data = "\n".join(lines).encode()
        file_id = new_file_id()
        with desk.folder.receive_upload(file_id) as receiver:
            receiver.write(data)
            receiver.commit()
        await desk.store.add_file(StoredFile(file_id, "k", "in.jsonl", "batch", len(data), self.wall, None))
        made = Batch(new_batch_id(), "k", CHAT, file_id, "7d", self.wall, self.wall + seconds, **more)
        return await desk.create(made)


def chat(number: int, text: str = "", **body: Any) -> str:
    messages = [{"role": "user", "content": text or f"question {number}"}]
    made = {"model": "auto", "max_tokens": 100, "messages": messages, **body}
    return json.dumps({"custom_id": f"c{number}", "method": "POST", "url": CHAT, "body": made})
