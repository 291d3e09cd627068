"""No packet of a bound request leaves: counted on the only cable that leads away from the node."""

import asyncio
import contextlib
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import home_with_model
from tests.e2e.namespaces import THERE, Cable, cable, run_in
from tests.running import ROOT, RunningNode, running_node

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

BOUND_KEY, FREE_KEY = "sk-appliance-bound", "sk-appliance-free"

CONFIG = """
[engine]
threads = 1
context_tokens = 8192
sequences = 8

[[providers]]
name = "outside"
region = "US"
base_url = "{address}"

[[providers.models]]
name = "large"
abilities = ["chat", "completions", "decisions", "json_schema", "tools", "logprobs"]
input_usd = 2.0
output_usd = 8.0

[[keys]]
name = "bound"
sha256 = "{bound}"
residency = "onsite"

[[keys]]
name = "free"
sha256 = "{free}"
"""

POLICY = """
# {version}
[defaults]
latency_budget_seconds = 0.5
max_wait_seconds = 1.5
total_seconds = 10.0
max_attempts = 5

[residency]
content = "personal_data"
timeout_seconds = {timeout}

[[routes]]
name = "kept"
match = {{ tag = ["kept"] }}
residency = "onsite"
targets = ["hosted", "onsite"]
escalation = {{ below_confidence = 1.0, max_rate = 1.0, to = ["hosted"] }}

[[routes]]
name = "decisions"
match = {{ task = ["classification"] }}
targets = ["onsite", "hosted"]
escalation = {{ below_confidence = 1.0, max_rate = 1.0, to = ["hosted"] }}
fallback = "outside"

[[routes]]
name = "outside"
targets = ["hosted", "onsite"]
"""
"""Hosted first, impatient, unsure of every answer: everything that may leave does."""

QUESTIONS = [{"type": "choice", "instructions": "Which?", "choices": [{"value": "yes"}, {"value": "no"}]}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
PERSONAL = "Write to jane.doe@example.com"


def bodies(text: str) -> list[tuple[str, dict[str, Any]]]:
    """One of each kind; decisions mostly, because they are soon done."""
    messages = [{"role": "user", "content": text}]
    decision = ("/v1/decisions", {"input": text, "questions": QUESTIONS})
    return [
        decision,
        ("/v1/chat/completions", {"messages": messages, "max_tokens": 1}),
        decision,
        ("/v1/systemone", {"state": text, "questions": {"q": {"type": "noul", "instructions": "Is it?"}}}),
        decision,
        ("/v1/chat/completions", {"messages": messages, "max_tokens": 2, "stream": True}),
        decision,
        ("/v1/completions", {"prompt": text, "max_tokens": 1}),
        decision,
        ("/v1/chat/completions", {"messages": messages, "max_tokens": 1, "model": "outside/large"}),
        decision,
        ("/v1/decisions/batch", {"inputs": [text, "second"], "questions": QUESTIONS}),
        decision,
        ("/v1/extract", {"text": text, "schema": SCHEMA, "max_tokens": 8}),
    ]


BINDINGS: dict[str, tuple[str, dict[str, str], str]] = {
    "key": (BOUND_KEY, {}, "hello"),
    "header": (FREE_KEY, {"x-appliance-residency": "onsite"}, "hello"),
    "route": (FREE_KEY, {"x-appliance-tag": "kept"}, "hello"),
    "content": (FREE_KEY, {}, PERSONAL),
    "another region": (FREE_KEY, {"x-appliance-residency": "region:EU"}, "hello"),
    "key, against a header": (BOUND_KEY, {"x-appliance-residency": "any"}, "hello"),
}
"""What binds a request: key, headers and text."""


class Traffic:
    """Bound requests of every kind, in turn; what became of them."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._turn = itertools.cycle(
            (binding, path, body)
            for number in range(14)
            for binding in BINDINGS
            for path, body in [bodies(BINDINGS[binding][2])[number]]
        )
        self.statuses: Counter[int] = Counter()
        self.by_binding: Counter[str] = Counter()
        self.locations: Counter[str] = Counter()
        self.decisions: dict[str, str] = {}
        """Binding -> the id of one decision."""

    @property
    def sent(self) -> int:
        return sum(self.statuses.values())

    async def send(self, count: int, *, at_once: int) -> Counter[int]:
        """`count` requests; the statuses of these."""
        before = self.statuses.copy()
        left = iter(range(count))
        limits = httpx.Limits(max_connections=at_once)
        async with httpx.AsyncClient(base_url=self._url, timeout=60, limits=limits) as client:

            async def work() -> None:
                for _ in left:
                    await self._one(client)

            await asyncio.gather(*(work() for _ in range(at_once)))
        return self.statuses - before

    async def _one(self, client: httpx.AsyncClient) -> None:
        binding, path, body = next(self._turn)
        key, headers, _ = BINDINGS[binding]
        reply = await client.post(path, json=body, headers={"authorization": f"Bearer {key}", **headers})
        self.statuses[reply.status_code] += 1
        self.by_binding[binding] += 1
        self.locations[reply.headers["x-appliance-location"]] += 1
        self.decisions.setdefault(binding, reply.headers["x-appliance-decision"])


@contextlib.contextmanager
def provider_outside(wire: Cable) -> Iterator[str]:
    """The address of a stand-in provider at the other end of the cable."""
    command = [*wire.within(wire.outside), sys.executable, "-m", "tests.standin", "--host", THERE]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


@contextlib.contextmanager
def node_inside(wire: Cable, home: Path, address: str) -> Iterator[RunningNode]:
    hashes = {"bound": BOUND_KEY, "free": FREE_KEY}
    config = CONFIG.format(
        address=address, **{name: hashlib.sha256(key.encode()).hexdigest() for name, key in hashes.items()}
    )
    policy = POLICY.format(version=1, timeout=2.0)
    with running_node(home, config=config, policy=policy, within=wire.within(wire.inside)) as node:
        yield node


async def counts(address: str) -> int:
    async with httpx.AsyncClient() as client:
        return int((await client.get(address.removesuffix("/v1") + "/counts")).json()["calls"])


async def until_ready(client: httpx.AsyncClient) -> None:
    """Another process has no event to wait for. The engine, not the provider, must be ready."""
    async with asyncio.timeout(60):
        while True:
            rows = (await client.get("/readyz", headers={"authorization": f"Bearer {FREE_KEY}"})).json()["targets"]
            if all(row["ready"] for row in rows):
                return
            await asyncio.sleep(0.05)


async def overflow(node: RunningNode, traffic: Traffic) -> None:
    """The engine is filled with long answers first, so most of the others find no place in time."""
    async with httpx.AsyncClient(base_url=node.url, timeout=60) as client:
        long = {"messages": [{"role": "user", "content": "Tell a long story."}], "max_tokens": 300, "stream": True}
        headers = {"authorization": f"Bearer {BOUND_KEY}"}
        busy = [asyncio.create_task(client.post("/v1/chat/completions", json=long, headers=headers)) for _ in range(24)]
        statuses = await traffic.send(240, at_once=120)
        assert statuses[429], f"nobody had to go without: {statuses}"
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)


async def failures(node: RunningNode, traffic: Traffic) -> None:
    """The engine is killed under its requests, and others come while it is down."""
    async with httpx.AsyncClient(base_url=node.url, timeout=60) as client:
        for _ in range(2):
            await until_ready(client)
            sending = asyncio.create_task(traffic.send(120, at_once=40))
            await asyncio.sleep(0.3)
            for pid in node.engine_pids():
                os.kill(pid, signal.SIGKILL)
            await sending
        await until_ready(client)


async def reloads(node: RunningNode, traffic: Traffic) -> None:
    """The policy is replaced under the requests, by one that gives no time to search and back again."""
    for version, timeout in ((2, 0.000001), (3, 2.0)):
        sending = asyncio.create_task(traffic.send(80, at_once=16))
        await asyncio.sleep(0.2)
        (node.data_dir / "policy.toml").write_text(POLICY.format(version=version, timeout=timeout))
        node.process.send_signal(signal.SIGHUP)
        if version == 2:
            await unsearched(node)
        await sending


async def unsearched(node: RunningNode) -> None:
    """Harmless texts, too long for the time there is."""
    body = {"input": "harmless 12-34 567 " * 1500, "questions": QUESTIONS}
    headers = {"authorization": f"Bearer {FREE_KEY}"}
    async with httpx.AsyncClient(base_url=node.url, timeout=60) as client:
        async with asyncio.timeout(30):
            while True:
                asked = {"endpoint": "decisions", **body}
                told = (await client.post("/v1/explain", json=asked, headers=headers)).json()
                if "longer than" in told["residency_reason"]:
                    break  # the new policy is in force
                await asyncio.sleep(0.05)
        replies = await asyncio.gather(*(client.post("/v1/decisions", json=body, headers=headers) for _ in range(10)))
    assert all(reply.headers["x-appliance-location"] in ("onsite", "none") for reply in replies)


async def why(node: RunningNode, traffic: Traffic) -> dict[str, str]:
    """Binding -> the reason that the ledger has, of one decision each."""
    reasons = {}
    async with httpx.AsyncClient(base_url=node.url, timeout=60) as client:
        for binding, decision in traffic.decisions.items():
            headers = {"authorization": f"Bearer {BINDINGS[binding][0]}"}
            reasons[binding] = (await client.get(f"/v1/explain/{decision}", headers=headers)).json()["residency_reason"]
    return reasons


async def unbound(node: RunningNode) -> httpx.Response:
    async with httpx.AsyncClient(base_url=node.url, timeout=60) as client:
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
        return await client.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {FREE_KEY}"})


def test_of_a_thousand_bound_requests_no_packet_leaves(smollm2_path: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    home = home_with_model(tmp_path, smollm2_path)
    with cable() as wire, provider_outside(wire) as address, node_inside(wire, home, address) as node:
        traffic = Traffic(node.url)

        async def all_of_it() -> None:
            quiet = await traffic.send(280, at_once=8)
            assert quiet[200] > 200, quiet
            assert quiet[403], "the pinned ones are refused"
            await overflow(node, traffic)
            await failures(node, traffic)
            await reloads(node, traffic)

        run_in(wire.inside, all_of_it)
        print(f"{traffic.sent} requests, {dict(traffic.statuses)}, {time.monotonic() - started:.0f} s")  # noqa: T201
        assert traffic.sent >= 920
        run_in(wire.inside, lambda: traffic.send(max(0, 1000 - traffic.sent), at_once=8))
        assert traffic.sent >= 1000
        assert set(traffic.statuses) <= {200, 403, 429, 502, 503, 504}, traffic.statuses
        assert set(traffic.locations) <= {"onsite", "none"}, traffic.locations
        assert min(traffic.by_binding[binding] for binding in BINDINGS) >= 100
        assert wire.packets_out() == 0
        assert run_in(wire.outside, lambda: counts(address)) == 0

        reasons = run_in(wire.inside, lambda: why(node, traffic))
        assert "key 'bound'" in reasons["key"]
        assert "the request's header" in reasons["header"]
        assert "route 'kept'" in reasons["route"]
        assert "its content (e-mail address)" in reasons["content"]
        assert "region:EU by the request's header" in reasons["another region"]
        assert "the request's header says any" in reasons["key, against a header"]
        assert wire.packets_out() == 0

        # What shows that all of this could have failed: one that may leave does, and is counted.
        reply = run_in(wire.inside, lambda: unbound(node))
        assert reply.headers["x-appliance-location"] == "hosted"
        assert wire.packets_out() > 0
        assert run_in(wire.outside, lambda: counts(address)) == 1
