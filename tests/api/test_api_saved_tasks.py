"""Saved tasks over HTTP, on disk, in jobs' lines and in every endpoint that takes one."""

import errno
import hashlib
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from appliance.api.auth import Authenticator
from appliance.config import KeySettings
from appliance.core import UpstreamCall
from appliance.errors import ConfigError, RequestError, StorageFull
from appliance.jobs.lines.executor import LineExecutor
from appliance.jobs.lines.requests import LineRequests
from appliance.jobs.models import BatchLine, BatchTerms
from appliance.router.pii.text_extractor import extract_text
from appliance.tasks.calibration_store import TaskCalibrationStore
from appliance.tasks.saved_tasks import read_saved_task
from appliance.tasks.store import SavedTasks
from tests.api.stand_ins import StandInPipeline, make_app, served
from tests.api.test_api_app import KEYS
from tests.tasks.rows import chat_payload

pytestmark = pytest.mark.anyio

TOPIC: dict[str, Any] = {
    "type": "choice",
    "name": "topic",
    "instructions": "What is it about?",
    "choices": [{"value": "billing", "description": "money"}, {"value": "sports"}],
}
EXAMPLES = [{"input": "Twice charged", "label": "billing"}, {"input": "Two goals", "label": "sports"}]
MAIL: dict[str, Any] = {"name": "mail", "questions": [TOPIC], "examples": EXAMPLES, "debias": True}
SCHEMA = {"type": "object", "properties": {"total": {"type": "number", "x-normalise": "amount"}}}
RECEIPT: dict[str, Any] = {"name": "receipt", "schema": SCHEMA, "evidence": True, "max_tokens": 80}


def answer(outgoing: UpstreamCall) -> Any:
    if outgoing.path == "/chat/completions":
        return chat_payload('{"total":"1.50"}')
    rows = [{"label": "x", "logprob": math.log(0.6)}, {"label": "y", "logprob": math.log(0.3)}]
    return {"results": [{"labels": rows, "label_mass": 0.9} for _ in outgoing.body["items"]]}


@pytest.fixture
def pipeline() -> StandInPipeline:
    return StandInPipeline(reply=answer)


@pytest.fixture
async def http(pipeline: StandInPipeline) -> AsyncIterator[httpx.AsyncClient]:
    async with served(make_app(pipeline)) as url, httpx.AsyncClient(base_url=url) as http:
        yield http


async def saved(http: httpx.AsyncClient, **definition: Any) -> dict[str, Any]:
    told = await http.post("/v1/tasks", json=definition)
    assert told.status_code == 200, told.text
    row: dict[str, Any] = told.json()
    return row


async def test_a_name_and_a_text_are_enough(http: httpx.AsyncClient, pipeline: StandInPipeline) -> None:
    row = await saved(http, **MAIL)
    assert (row["name"], row["kind"], row["version"], row["versions"]) == ("mail", "decision", 1, [1])
    told = (await http.post("/v1/decisions", json={"task": "mail", "input": "Pay me!"})).json()
    assert told["answers"][0]["choice"] == "billing"
    items = pipeline.sent[-1].body["items"]
    assert len(items) == 2, "asked in both orders"
    assert [row["content"] for row in items[0]["messages"][1:]][-1] == "Pay me!"
    assert "Twice charged" in json.dumps(items) and "money" in json.dumps(items)


async def test_every_decision_endpoint_takes_the_task(http: httpx.AsyncClient) -> None:
    await saved(http, **MAIL)
    many = (await http.post("/v1/decisions/batch", json={"task": "mail", "inputs": ["a", "b"]})).json()
    assert [row["answers"][0]["choice"] for row in many["results"]] == ["billing", "billing"]
    one = (await http.post("/v1/systemone", json={"task": "mail", "state": "a"})).json()
    assert one["answers"]["topic"]["choice"] == "billing"
    dry = (await http.post("/v1/explain", json={"endpoint": "decisions", "task": "mail", "input": "a"})).json()
    assert dry["dry_run"] is True


async def test_system_one_is_given_every_kind_of_question(http: httpx.AsyncClient) -> None:
    score = {
        "type": "score",
        "instructions": "How?",
        "levels": [{"label": "calm"}, {"label": "angry", "description": "!"}],
    }
    truth = {"type": "predicate", "instructions": "Is it urgent?"}
    await saved(http, name="mood", questions=[score, truth, {**TOPIC, "choices": [{"value": True}, {"value": "no"}]}])
    told = (await http.post("/v1/systemone", json={"task": "mood", "state": "a"})).json()
    assert {name: row["type"] for name, row in told["answers"].items()} == {
        "answer1": "score",
        "answer2": "noul",
        "topic": "choice",
    }
    assert told["answers"]["answer1"]["legend"] == {"0": "calm", "1": "angry: !"}


async def test_an_extraction_takes_its_schema_from_the_task(http: httpx.AsyncClient, pipeline: StandInPipeline) -> None:
    await saved(http, **RECEIPT)
    told = (await http.post("/v1/extract", json={"task": "receipt", "text": "It is RM 1.50"})).json()
    assert told["object"] == {"total": 1.5} and told["normalised"]["/total"]["currency"] == "MYR"
    assert told["evidence"]["/total"] == {"start": 9, "end": 13}
    assert pipeline.sent[-1].body["max_tokens"] == 80
    await http.post("/v1/extract", json={"task": "receipt", "text": "x", "max_tokens": 90})
    assert pipeline.sent[-1].body["max_tokens"] == 90


async def test_versions_are_kept_and_can_be_asked_for(http: httpx.AsyncClient, pipeline: StandInPipeline) -> None:
    await saved(http, **MAIL)
    assert (await saved(http, **MAIL))["version"] == 1, "nothing new was said"
    other = {**TOPIC, "instructions": "Which subject?"}
    assert (await saved(http, name="mail", questions=[other]))["versions"] == [1, 2]
    for name, words in (("mail", "Which subject?"), ("mail@1", "What is it about?")):
        await http.post("/v1/decisions", json={"task": name, "input": "x"})
        assert words in json.dumps(pipeline.sent[-1].body)
    first = (await http.get("/v1/tasks/mail", params={"version": 1})).json()
    assert first["version"] == 1 and first["examples"] == EXAMPLES
    assert (await http.get("/v1/tasks/mail", params={"version": 3})).status_code == 404
    assert (await http.get("/v1/tasks/mail", params={"version": "x"})).status_code == 400
    assert (await http.post("/v1/decisions", json={"task": "mail@9", "input": "x"})).status_code == 404


async def test_a_classifier_is_asked_where_the_caller_names_no_model(pipeline: StandInPipeline) -> None:
    async with served(make_app(pipeline)) as url, httpx.AsyncClient(base_url=url) as http:
        await saved(http, name="mail", classifier="topics", questions=[TOPIC], model="onsite/small")
        for model in ({}, {"model": "auto"}, {"model": "onsite/small"}):
            await http.post("/v1/decisions", json={"task": "mail", "input": "x", **model})
    assert [request.model for request in pipeline.requests] == [
        "classifier/topics",
        "classifier/topics",
        "onsite/small",
    ]


async def test_what_was_calibrated_for_the_task_holds_until_it_is_changed(http: httpx.AsyncClient) -> None:
    await saved(http, **MAIL)
    rows = [{"input": f"text {n}", "label": "billing" if n % 3 else "sports"} for n in range(40)]
    report = await http.post("/v1/decisions/calibrate", json={"task": "mail", "examples": rows})
    assert report.status_code == 200, report.text
    ask = {"task": "mail", "input": "x"}
    assert (await http.post("/v1/decisions", json=ask)).json()["answers"][0]["calibrated_for"] == "mail"
    one = (await http.post("/v1/systemone", json={"task": "mail", "state": "x"})).json()
    assert one["answers"]["topic"]["calibrated_for"] == "mail"
    assert (await http.get("/v1/tasks/mail")).json()["calibrated"][0]["applies"] is True
    await saved(http, name="mail", questions=[TOPIC], examples=EXAMPLES)
    assert "calibrated_for" not in (await http.post("/v1/decisions", json=ask)).json()["answers"][0]
    assert (await http.get("/v1/tasks/mail")).json()["calibrated"][0]["applies"] is False


async def test_a_task_that_was_only_calibrated_is_listed_and_removed_too(http: httpx.AsyncClient) -> None:
    rows = [{"input": f"text {n}", "label": "billing" if n % 3 else "sports"} for n in range(40)]
    await http.post("/v1/decisions/calibrate", json={"task": "old/one", "questions": [TOPIC], "examples": rows})
    (row,) = (await http.get("/v1/tasks")).json()["data"]
    assert (row["name"], row["version"], len(row["calibrated"])) == ("old/one", None, 1)
    assert (await http.delete("/v1/tasks/old/one")).json()["deleted"] is True
    assert (await http.get("/v1/tasks")).json()["data"] == []
    assert (await http.delete("/v1/tasks/old/one")).status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/decisions", {"task": "nobody", "input": "x"}, 404, "task"),
        ("/v1/extract", {"task": "nobody", "text": "x"}, 404, "task"),
        ("/v1/extract", {"task": "mail", "text": "x"}, 400, "task"),
        ("/v1/decisions", {"task": "receipt", "input": "x"}, 400, "task"),
        ("/v1/decisions", {"task": "mail", "input": "x", "questions": [TOPIC]}, 400, "questions"),
        ("/v1/decisions", {"task": "mail", "input": "x", "debias": False}, 400, "debias"),
        ("/v1/extract", {"task": "receipt", "text": "x", "schema": SCHEMA}, 400, "schema"),
        ("/v1/decisions", {"task": 5, "input": "x"}, 400, "task"),
        ("/v1/decisions", {"task": "mail"}, 400, "input"),
    ],
)
async def test_a_request_that_does_not_fit_the_task_is_refused(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    await saved(http, **MAIL)
    await saved(http, **RECEIPT)
    told = await http.post(path, json=body)
    assert (told.status_code, told.json()["error"]["param"]) == (status, param), told.text


@pytest.mark.parametrize(
    ("definition", "param"),
    [
        ({"name": "a b", "questions": [TOPIC]}, "name"),
        ({"name": "../x", "questions": [TOPIC]}, "name"),
        ({"questions": [TOPIC]}, "name"),
        ({"name": "x"}, "questions"),
        ({"name": "x", "questions": [TOPIC], "schema": SCHEMA}, "schema"),
        ({"name": "x", "questions": [TOPIC], "kind": "extraction"}, "kind"),
        ({"name": "x", "questions": [TOPIC], "colour": "red"}, "colour"),
        ({"name": "x", "questions": [{**TOPIC, "choices": []}]}, "questions[0].choices"),
        ({"name": "x", "questions": [TOPIC], "examples": [{"input": "x", "label": "y"}]}, "examples[0].label"),
        ({"name": "x", "questions": [TOPIC], "debias": "yes"}, "debias"),
        ({"name": "x", "questions": [TOPIC], "keys": []}, "keys"),
        ({"name": "x", "questions": [TOPIC], "keys": [5]}, "keys[0]"),
        ({"name": "x", "classifier": "a/b"}, "classifier"),
        ({"name": "x", "classifier": "a", "examples": EXAMPLES}, "questions"),
        ({"name": "x", "schema": {"type": "list"}}, "schema"),
        ({"name": "x", "schema": SCHEMA, "normalise": {"decimal": "!"}}, "normalise.decimal"),
    ],
)
async def test_a_definition_that_could_not_be_used_is_not_saved(
    http: httpx.AsyncClient, definition: dict[str, Any], param: str
) -> None:
    told = await http.post("/v1/tasks", json=definition)
    assert (told.status_code, told.json()["error"]["param"]) == (400, param), told.text
    assert (await http.get("/v1/tasks")).json()["data"] == []


async def test_only_admins_save_and_only_named_keys_use_it(pipeline: StandInPipeline) -> None:
    async with served(make_app(pipeline, keys=KEYS)) as url, httpx.AsyncClient(base_url=url) as http:
        client, admin = {"authorization": "Bearer sk-client"}, {"authorization": "Bearer sk-admin"}
        assert (await http.post("/v1/tasks", json=MAIL, headers=client)).status_code == 403
        assert (await http.post("/v1/tasks", json=MAIL)).status_code == 401
        told = await http.post("/v1/tasks", json={**MAIL, "keys": ["somebody"]}, headers=admin)
        assert told.status_code == 200
        assert (await http.get("/v1/tasks", headers=client)).json()["data"] == []
        assert (await http.get("/v1/tasks/mail", headers=client)).status_code == 404
        ask = {"task": "mail", "input": "x"}
        assert (await http.post("/v1/decisions", json=ask, headers=client)).status_code == 404
        assert (await http.post("/v1/decisions", json={**ask, "task": "mail@1"}, headers=client)).status_code == 404
        assert (await http.post("/v1/decisions", json=ask, headers=admin)).status_code == 200
        assert (await http.delete("/v1/tasks/mail", headers=client)).status_code == 403
        assert (await http.delete("/v1/tasks/mail", headers=admin)).status_code == 200


async def test_lines_of_jobs_name_tasks_too(pipeline: StandInPipeline) -> None:
    saved = SavedTasks()
    saved.put(read_saved_task({**MAIL, "keys": ["somebody"]}, 0, "now"))
    saved.put(read_saved_task({**RECEIPT, "keys": ["somebody"]}, 0, "now"))
    keys = [KeySettings(name=name, sha256=hashlib.sha256(name.encode()).hexdigest()) for name in ("somebody", "else")]
    auth = Authenticator(keys, host="127.0.0.1")
    lines = LineExecutor(LineRequests(auth, TaskCalibrationStore(), saved), lambda: pipeline)
    asked = [
        ("/v1/decisions", {"task": "mail", "input": "x"}),
        ("/v1/systemone", {"task": "mail", "state": "x"}),
        ("/v1/extract", {"task": "receipt", "text": "RM 1.50"}),
    ]
    for number, (url, body) in enumerate(asked, 1):
        line = BatchLine(number, 0, 0, str(number), url, body, b"")
        (done,) = await lines.execute([line], BatchTerms("batch", "somebody", "any", None, 60.0))
        assert done.status == 200, done.body
        (refused,) = await lines.execute([line], BatchTerms("batch", "else", "any", None, 60.0))
        assert refused.status == 404
    assert done.body["object"] == {"total": 1.5}


async def test_what_a_task_shows_the_model_is_searched_like_the_text(
    http: httpx.AsyncClient, pipeline: StandInPipeline
) -> None:
    await saved(http, **MAIL)
    await http.post("/v1/decisions", json={"task": "mail", "input": "x"})
    read = extract_text(pipeline.requests[-1].body)
    assert read is not None and "Twice charged" in read.text and "money" in read.text


def test_tasks_outlive_the_program(tmp_path: Path) -> None:
    kept = SavedTasks(tmp_path / "tasks")
    for name in ("mail", "Mail", "MAIL"):
        kept.put(read_saved_task({**MAIL, "name": name, "description": name}, 0, "2026-01-01T00:00:00+00:00"))
    kept.put(read_saved_task({**MAIL, "debias": False}, 0, "2026-01-02T00:00:00+00:00"))
    again = SavedTasks(tmp_path / "tasks")
    assert again.tasks == kept.tasks and [one.version for one in again.tasks["mail"]] == [1, 2]
    assert again.remove("Mail") and not again.remove("Mail")
    assert set(SavedTasks(tmp_path / "tasks").tasks) == {"mail", "MAIL"}
    assert not list((tmp_path / "tasks").glob("*.part"))
    assert not any(path.stat().st_mode & 0o077 for path in ((tmp_path / "tasks"), *(tmp_path / "tasks").iterdir()))


def test_a_file_that_cannot_be_read_stops_the_start_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "mail.json").write_text('{"versions": []}')
    with pytest.raises(ConfigError, match=r"mail\.json"):
        SavedTasks(tmp_path)


def test_versions_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.tasks.store.MAX_VERSIONS", 2)
    kept = SavedTasks()
    for number in range(2):
        kept.put(read_saved_task({**MAIL, "description": str(number)}, 0, "now"))
    with pytest.raises(RequestError, match="at most 2 versions"):
        kept.put(read_saved_task({**MAIL, "description": "more"}, 0, "now"))


def test_on_a_full_disk_the_task_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = SavedTasks(tmp_path / "tasks")
    kept.put(read_saved_task(MAIL, 0, "now"))

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patched, pytest.raises(StorageFull):
        patched.setattr("os.fsync", full)
        kept.put(read_saved_task({**MAIL, "debias": False}, 0, "now"))
    assert len(kept.tasks["mail"]) == len(SavedTasks(tmp_path / "tasks").tasks["mail"]) == 1
