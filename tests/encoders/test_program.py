"""The program over its socket, as the router drives it: it trains in a child while it serves."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from appliance.encoders.load_report import SpeedMeter
from appliance.encoders.service import EncoderService
from appliance.engines.base import read_load
from tests.encoders.samples import labelled

pytestmark = pytest.mark.anyio


@dataclass
class Program:
    client: httpx.AsyncClient
    folder: Path
    process: asyncio.subprocess.Process

    async def logged(self, event: str, **facts: Any) -> None:
        """Wait for a line of its log."""
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            told = json.loads(line)
            if told["event"] == event and facts.items() <= told.items():
                return
        raise AssertionError(f"the program ended without saying {event}")

    async def trained(self, name: str) -> Any:
        """The training of that name, when it has ended."""
        await self.logged("training_ended", name=name)
        return (await self.client.get(f"/v1/classifiers/{name}/training")).json()


@asynccontextmanager
async def started(folder: Path) -> AsyncIterator[Program]:
    words = ["--uds", str(folder / "s"), "--data", str(folder / "data"), "--models", str(folder / "models")]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "appliance.encoders", *words, "--threads", "1", stderr=asyncio.subprocess.PIPE
    )
    try:
        transport = httpx.AsyncHTTPTransport(uds=str(folder / "s"))
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:
            program = Program(client, folder, process)
            await program.logged("ready")
            yield program
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        # its log is read to the end, or it could not write its last words
        await process.communicate()
    assert process.returncode == 0
    assert not (folder / "s").exists()


@pytest.fixture(scope="module")
async def program(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Program]:
    """One for all tests here: each has classifiers of names of its own."""
    async with started(tmp_path_factory.mktemp("encoders")) as found:
        yield found


@pytest.fixture
def client(program: Program) -> httpx.AsyncClient:
    return program.client


async def test_a_classifier_is_trained_asked_measured_rolled_back_and_removed(program: Program) -> None:
    client = program.client
    assert (await client.get("/health")).status_code == 200
    assert read_load((await client.get("/load")).json()).sequences_capacity > 0
    for version in (1, 2):
        begun = await client.post("/v1/classifiers", json={"name": "mail", "examples": labelled(90)})
        assert begun.status_code == 202
        assert (await client.get("/health")).status_code == 200
        ended = await program.trained("mail")
        assert (ended["state"], ended["version"]) == ("done", version), ended
    kept = [path for path in (program.folder / "data").rglob("*") if path.is_file()]
    assert kept and not any(path.stat().st_mode & 0o077 for path in kept)
    asked = {"model": "mail", "texts": ["where is my parcel, the courier is late", "refund the invoice please"]}
    told = (await client.post("/v1/classify", json=asked)).json()
    chosen = [told["labels"][row.index(max(row))] for row in told["probabilities"]]
    assert chosen == ["delivery", "billing"]
    assert [sum(row) for row in told["probabilities"]] == pytest.approx([1.0, 1.0], abs=1e-5)
    measured = (await client.post("/v1/classifiers/mail/evaluate", json={"examples": labelled(50, seed=3)})).json()
    assert measured["accuracy"] > 0.9
    assert (await client.post("/v1/classifiers/mail/rollback")).json()["serving"] == 1
    assert (await client.post("/v1/classify", json=asked)).json()["version"] == 1
    assert (await client.post("/v1/classify", json={**asked, "version": 2})).json()["version"] == 2
    assert "mail" in (await client.get("/v1/served")).json()["classifiers"]
    assert (await client.delete("/v1/classifiers/mail")).status_code == 200
    assert (await client.post("/v1/classify", json=asked)).status_code == 404


async def test_a_training_is_cancelled_and_another_one_waits_for_its_end(program: Program) -> None:
    client = program.client
    body = {"name": "slow", "examples": labelled(6_000, unclear=0.3)}
    assert (await client.post("/v1/classifiers", json=body)).status_code == 202
    second = await client.post("/v1/classifiers", json={"name": "other", "examples": labelled(60)})
    assert second.status_code == 429
    assert "'slow' is being trained" in second.text
    assert (await client.delete("/v1/classifiers/slow/training")).json()["state"] == "cancelled"
    assert (await client.get("/v1/classifiers/slow")).status_code == 404
    again = await client.post("/v1/classifiers", json={"name": "other", "examples": labelled(60)})
    assert again.status_code == 202
    assert (await program.trained("other"))["state"] == "done"


async def test_a_training_whose_disk_is_full_fails_and_says_so(program: Program) -> None:
    (program.folder / "data" / "full").write_text("a file where a folder belongs")
    client = program.client
    await client.post("/v1/classifiers", json={"name": "full", "examples": labelled(60)})
    ended = await program.trained("full")
    assert ended["state"] == "failed"
    assert "cannot be written" in ended["error"]


@pytest.mark.parametrize(
    ("path", "body", "status", "told"),
    [
        ("/v1/classify", {"model": "none", "texts": ["x"]}, 404, "no classifier 'none'"),
        ("/v1/classify", {"model": "none", "texts": []}, 400, "list of 1 to 10000 texts"),
        ("/v1/classify", {"model": "none", "texts": ["x"] * 10_001}, 400, "at most 10000"),
        ("/v1/classifiers", {"name": "x", "examples": [{"text": "a", "label": "b"}] * 2}, 400, "at least two"),
        ("/v1/classifiers", {"name": "x", "examples": labelled(9), "accuracy": 2}, 400, "between 0 and 1"),
        ("/v1/classifiers", {"name": "x", "examples": labelled(9), "tier": "gpt"}, 400, "words or encoder"),
        ("/v1/classifiers/none/evaluate", {"examples": labelled(9)}, 404, "no classifier 'none'"),
        ("/v1/classifiers/none/rollback", {}, 404, "no classifier 'none'"),
        ("/v1/embeddings", {"model": "none", "input": "x"}, 404, "appliance models pull"),
    ],
)
async def test_mistakes_are_answered_with_what_would_be_right(
    client: httpx.AsyncClient, path: str, body: Any, status: int, told: str
) -> None:
    answer = await client.post(path, json=body)
    assert answer.status_code == status
    assert told in answer.json()["error"]["message"]


async def test_a_body_that_is_no_json_is_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/classifiers", content=b'{"name": "caf\xe9"}')
    assert answer.status_code == 400
    assert "not valid JSON" in answer.text


async def test_the_program_ends_with_the_one_that_holds_its_pipe(tmp_path: Path) -> None:
    read, write = os.pipe()
    words = ["--uds", str(tmp_path / "s"), "--data", str(tmp_path / "d"), "--models", str(tmp_path)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "appliance.encoders", *words, "--parent-guard-fd", str(read), pass_fds=(read,)
    )
    os.close(read)
    os.close(write)
    assert await asyncio.wait_for(process.wait(), 30) == 0


@pytest.mark.slow
async def test_a_candidate_is_trained_beside_the_serving_version_seen_in_shadow_and_promoted(program: Program) -> None:
    client = program.client
    first = {"name": "seen", "examples": labelled(60), "keep_examples": True}
    await client.post("/v1/classifiers", json=first)
    assert (await program.trained("seen"))["version"] == 1
    more = {"name": "seen", "examples": labelled(30, seed=5), "with_kept": True, "serve": False}
    await client.post("/v1/classifiers", json=more)
    assert (await program.trained("seen"))["version"] == 2
    told = (await client.get("/v1/classifiers/seen?version=2")).json()
    assert (told["serving"], told["report"]["examples"]) == (1, 90)
    assert (await client.post("/v1/classifiers/seen/shadow", json={"version": 2})).status_code == 200
    texts = [row["text"] for row in labelled(40, seed=8)]
    assert (await client.post("/v1/classify", json={"model": "seen", "texts": texts})).json()["version"] == 1
    while (shadow := (await client.get("/v1/classifiers/seen")).json()["shadow"])["texts"] == 0:
        await client.get("/health")
    assert shadow["texts"] == 40 and shadow["disagreed"] < 10
    assert (await client.delete("/v1/classifiers/seen?version=1")).status_code == 400, "it serves"
    assert (await client.post("/v1/classifiers/seen/rollback", json={"version": 2})).json()["serving"] == 2
    assert (await client.get("/v1/classifiers/seen")).json()["shadow"] is None
    assert (await client.delete("/v1/classifiers/seen?version=1")).status_code == 200
    assert (await client.get("/v1/classifiers/seen")).json()["versions"] == [2]


@pytest.mark.slow
async def test_a_threshold_is_told_of_held_out_rows_and_of_traffic(program: Program) -> None:
    client = program.client
    await client.post("/v1/classifiers", json={"name": "bounded", "examples": labelled(400)})
    assert (await program.trained("bounded"))["state"] == "done"

    async def told(**more: Any) -> Any:
        body = {"bound": 0.05, "confidence": 0.95, "over_texts": 0, **more}
        return (await client.post("/v1/classifiers/bounded/threshold", json=body)).json()

    plain = await told()
    assert plain["held_out"]["threshold"] is not None and plain["held_out"]["is_enough"]
    assert plain["live"] == {**plain["live"], "threshold": None, "is_enough": False, "rows": 0}
    few = await told(live=[[0.9, True]] * 58)
    assert not few["live"]["is_enough"]
    right = await told(live=[[0.9, True]] * 59)
    assert (right["live"]["threshold"], right["live"]["is_enough"]) == (0.9, True)
    wrong = await told(live=[[0.9, False]] * 59)
    assert (wrong["live"]["threshold"], wrong["live"]["is_enough"]) == (None, True)
    complained = await told(complaints=[0.99] * 60)
    assert (complained["held_out"]["threshold"] or 1.0) > plain["held_out"]["threshold"]
    refused = await client.post("/v1/classifiers/bounded/threshold", json={"bound": 2.0, "confidence": 0.95})
    assert refused.status_code == 400


async def test_the_load_has_the_speed_that_was_measured_and_none_before(program: Program) -> None:
    served = (await program.client.get("/v1/served")).json()
    load = read_load((await program.client.get("/load")).json())
    assert bool(served["classifiers"]) or load.prefill_tokens_per_second == 0
    meter = SpeedMeter()
    assert meter.tokens_per_second == 0
    meter.observe(1_000, 0.5)
    assert (meter.tokens_per_second, meter.tokens_total) == (2_000, 1_000)
    meter.observe(3_000, 0.5)
    assert 2_000 < meter.tokens_per_second < 6_000


async def test_what_nobody_has_asked_yet_is_measured_on_texts_of_its_own(tmp_path: Path) -> None:
    service = EncoderService(data=tmp_path / "data", models=tmp_path / "models", threads=1)
    service.measure_speed_once()
    assert service.report_load().prefill_tokens_per_second == 0
    assert service.report_load().decode_tokens_per_second == {}
    await service.train({"name": "mail", "examples": labelled(90)})
    await service.training_jobs.wait_until_idle()
    service.measure_speed_once()
    await service.wait_until_measured()
    load = service.report_load()
    assert load.prefill_tokens_per_second > 0 and load.prefill_tokens_total > 0
    assert load.decode_tokens_per_second == {"1": load.prefill_tokens_per_second}
    await service.training_jobs.aclose()
