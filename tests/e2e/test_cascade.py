"""A cascade on a node as a user starts it: a classifier trained there, the real small model, and a provider."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import SMALL_ENGINE, home_with_model
from tests.encoders.samples import labelled
from tests.running import running_node
from tests.standin import StandIn

pytestmark = [pytest.mark.slow, pytest.mark.anyio, pytest.mark.timeout(240)]

LABELS = ["billing", "delivery", "login"]
CONFIG = """
[[providers]]
name = "cloud"
base_url = "{address}"

[[providers.models]]
name = "big"
abilities = ["decisions", "chat"]
input_usd = 1.0
output_usd = 1.0
"""
KEY = """
[[keys]]
name = "{name}"
sha256 = "{sha256}"
residency = "{residency}"
scopes = ["client", "admin"]
"""
POLICY = """
[[routes]]
name = "mail"
match = { task = ["classification"] }
targets = ["classifier/mail", "onsite", "hosted"]
keep_texts = true
cascade = { bound = 0.05, over_texts = 100, audit_rate = 0.5, below_confidence = 1.0 }

[[routes]]
name = "rest"
targets = ["onsite"]
"""
"""No local model is ever sure enough, and every other text is audited: all that may leave does."""


def right(path: str, body: Mapping[str, Any]) -> Any:
    """The provider says `login` to everything."""
    shares = [{"value": label, "probability": 1.0 if label == "login" else 0.0} for label in LABELS]
    return {"answers": [{"type": "choice", "choice": "login", "confidence": 1.0, "probabilities": shares}]}


class Node:
    def __init__(self, client: httpx.AsyncClient, provider: StandIn) -> None:
        self.client, self.provider = client, provider

    async def ask(self, method: str, path: str, body: Any = None, key: str = "free") -> httpx.Response:
        return await self.client.request(method, path, json=body, headers={"authorization": f"Bearer sk-{key}"})

    async def decide(self, texts: Sequence[str], key: str = "free") -> httpx.Response:
        choices = [{"value": label} for label in LABELS]
        question = {"type": "choice", "instructions": "What is it about?", "choices": choices}
        body = {"model": "auto", "inputs": list(texts), "questions": [question]}
        return await self.ask("POST", "/v1/decisions/batch", body, key)

    async def until_known(self) -> None:
        async with asyncio.timeout(60):
            while True:
                shown = (await self.ask("GET", "/v1/classifiers/mail")).json()
                if any(row["threshold"] is not None for row in (shown.get("traffic") or {}).get("thresholds", ())):
                    return
                await asyncio.sleep(0.2)


@pytest.fixture(scope="module")
async def node(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Node]:
    home = home_with_model(tmp_path_factory.mktemp("cascade"), smollm2_path)
    keys = "".join(
        KEY.format(name=name, sha256=hashlib.sha256(f"sk-{name}".encode()).hexdigest(), residency=residency)
        for name, residency in (("free", "any"), ("bound", "onsite"))
    )
    async with StandIn() as provider:
        provider.reply = right
        config = SMALL_ENGINE + CONFIG.format(address=provider.address) + keys
        with running_node(home, config=config, policy=POLICY) as running:
            async with httpx.AsyncClient(base_url=running.url, timeout=120) as client:
                made = Node(client, provider)
                begun = await made.ask("POST", "/v1/classifiers", {"name": "mail", "examples": labelled(300)})
                assert begun.status_code == 202, begun.text
                async with asyncio.timeout(120):
                    while (await made.ask("GET", "/v1/classifiers/mail/training")).json()["state"] == "running":
                        await asyncio.sleep(0.2)
                await made.until_known()
                yield made


async def test_a_bound_batch_cascades_on_the_site_alone(node: Node) -> None:
    before = node.provider.calls
    texts = [row["text"] for row in labelled(20, seed=4, unclear=0.5)]
    reply = await node.decide(texts, key="bound")
    by = {row["answers"][0]["answered_by"] for row in reply.json()["results"]}
    assert by == {"classifier/mail", "onsite/smollm2-135m-instruct"}
    assert reply.headers["x-appliance-location"] == "onsite"
    assert node.provider.calls == before, "not one call, audits included"


async def test_what_may_leave_goes_as_far_as_it_needs_and_callers_correct_it(node: Node) -> None:
    texts = [row["text"] for row in labelled(40, seed=5, unclear=0.3)]
    reply = await node.decide(texts)
    answers = [row["answers"][0] for row in reply.json()["results"]]
    by = [answer["answered_by"] for answer in answers]
    assert set(by) == {"classifier/mail", "cloud/big"}
    assert all(answer["choice"] == "login" for answer, who in zip(answers, by, strict=True) if who == "cloud/big")
    decision = reply.headers["x-appliance-decision"]
    said = {"decision_id": decision, "index": by.index("classifier/mail"), "label": "billing"}
    told = await node.ask("POST", "/v1/feedback", said)
    assert (told.status_code, told.json()["classifier"]) == (200, "classifier/mail")
    story = (await node.ask("GET", f"/v1/explain/{decision}")).json()
    assert {row["target"] for row in story["attempts"]} >= {"classifier/mail", "cloud/big"}
    traffic = (await node.ask("GET", "/v1/classifiers/mail")).json()["traffic"]
    assert traffic["days"][0]["audited"] > 0 and traffic["days"][0]["feedback"] == 1
    gone = (await node.ask("DELETE", "/v1/examples")).json()
    assert gone["key"] == "free" and gone["removed"] > 0
