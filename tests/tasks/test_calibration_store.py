"""Calibrated tasks: over HTTP, on disk, and in the answers that follow."""

import math
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from appliance.core import UpstreamCall
from appliance.errors import ConfigError
from appliance.tasks.calibration_store import TaskCalibrationStore
from appliance.tasks.decisions.decision_options import CalibrationParameters, DecisionMethod, TaskCalibration
from tests.api.stand_ins import SMALL, StandInPipeline, make_app, served
from tests.api.test_api_app import KEYS

pytestmark = pytest.mark.anyio

QUESTION = {"type": "predicate", "name": "urgent", "instructions": "Is it urgent?"}
EXAMPLES = [{"input": f"text {n}", "label": n % 2 == 0} for n in range(40)]
CALIBRATE: dict[str, Any] = {"task": "mail", "questions": [QUESTION], "examples": EXAMPLES}
RNG = random.Random(2)


def scores(outgoing: UpstreamCall) -> Any:
    """Always sure, often wrong."""
    results = []
    for item in outgoing.body["items"]:
        even = str(item["content"])[-1:] in "02468"
        share = 0.95 if even == (RNG.random() < 0.7) else 0.05
        rows = [{"label": "yes", "logprob": math.log(share)}, {"label": "no", "logprob": math.log(1 - share)}]
        results.append({"labels": rows, "label_mass": 0.5})
    return {"results": results}


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with served(make_app(StandInPipeline(reply=scores))) as url, httpx.AsyncClient(base_url=url) as http:
        yield http


async def test_a_calibrated_task_changes_the_answers_that_name_it(http: httpx.AsyncClient) -> None:
    body = {"input": "text 2", "questions": [QUESTION], "task": "mail"}
    missing = await http.post("/v1/decisions", json=body)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    report = (await http.post("/v1/decisions/calibrate", json=CALIBRATE)).json()
    (row,) = report["questions"]
    assert (report["task"], report["target"], row["name"], row["examples"]) == ("mail", SMALL.name, "urgent", 40)
    assert row["temperature"] > 1 and row["after"]["ece"] < row["before"]["ece"]
    for path, given in (("/v1/decisions", body), ("/v1/decisions/batch", {**body, "inputs": ["text 2"]})):
        told = (
            await http.post(path, json={k: v for k, v in given.items() if path[-5:] != "batch" or k != "input"})
        ).json()
        (answer,) = told["answers"] if "answers" in told else told["results"][0]["answers"]
        assert answer["calibrated_for"] == "mail"
        assert 0.05 < answer["probability"] < 0.95


async def test_a_dry_run_does_not_look_tasks_up(http: httpx.AsyncClient) -> None:
    body = {"endpoint": "decisions", "input": "x", "questions": [QUESTION], "task": "unheard of"}
    assert (await http.post("/v1/explain", json=body)).status_code == 200


async def test_calibrating_takes_the_scope_admin() -> None:
    app = make_app(StandInPipeline(reply=scores), keys=KEYS)
    async with served(app) as url, httpx.AsyncClient(base_url=url) as http:
        for text, status in (("sk-client", 403), ("sk-admin", 200)):
            response = await http.post(
                "/v1/decisions/calibrate", json=CALIBRATE, headers={"authorization": f"Bearer {text}"}
            )
            assert response.status_code == status, response.text


def fit(task: str = "mail", variant: str | None = "q8_0", temperature: float = 2.0, **method: Any) -> TaskCalibration:
    return TaskCalibration(
        task, "onsite/small", variant, DecisionMethod(**method), {"k": CalibrationParameters(temperature, (0.5, -0.5))}
    )


def test_fits_are_there_again_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "new" / "task_fits.json"
    kept = TaskCalibrationStore(path)
    for row in (fit(), fit(variant=None), fit("post"), fit(temperature=3.0)):
        kept.put(row)
    again = TaskCalibrationStore(path)
    assert {row.variant: row.fits["k"].temperature for row in again.tasks["mail"]} == {"q8_0": 3.0, None: 2.0}
    assert again.tasks["post"][0] == fit("post")
    assert [item.name for item in path.parent.iterdir()] == ["task_fits.json"]


def test_a_task_has_one_method(tmp_path: Path) -> None:
    kept = TaskCalibrationStore()
    kept.put(fit())
    kept.put(fit(variant=None, debias=True))
    assert [row.variant for row in kept.tasks["mail"]] == [None]


@pytest.mark.parametrize("text", ["", "[]", '{"fits": [{}]}', '{"fits": [{"task": "t", "fits": 5}]}'])
def test_a_damaged_file_stops_the_start_and_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "task_fits.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"task_fits\.json"):
        TaskCalibrationStore(path)
