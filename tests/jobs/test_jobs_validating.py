"""What it takes to look a file over once, however it is made and however often it is asked for."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from appliance.jobs import runner
from appliance.jobs.lines.validation import _chunks, validate_batch
from appliance.jobs.models import Batch
from tests.jobs.office import CHAT, Office, ended, line

pytestmark = pytest.mark.anyio


def of_model(number: int, model: str) -> str:
    one = json.loads(line(number))
    one["body"]["model"] = model
    return json.dumps(one)


async def test_no_more_files_are_looked_over_at_once_than_there_is_memory_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = most = 0

    async def watched(*given: Any, **more: Any) -> Batch:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        try:
            return await validate_batch(*given, **more)
        finally:
            now -= 1

    monkeypatch.setattr(runner, "validate_batch", watched)
    office = Office(tmp_path)
    async with office.desk() as desk:
        made = [await office.batch(desk, [line(1)]) for _ in range(8)]
        assert [(await ended(desk, one)).status for one in made] == ["completed"] * 8
    assert most == 2


def test_a_file_of_as_many_models_as_lines_is_not_held_by_their_names(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_text("\n".join(of_model(number, f"{number}" * 2_000) for number in range(1, 1_001)))
    for seen in _chunks(path, CHAT, 1_000_000):
        assert len(seen.models) == 2
        assert sum(map(len, seen.models)) <= 400


@pytest.mark.parametrize(("models", "told"), [(["m", "m"], "m"), (["m", "n"], None), (["m"] * 3 + ["n"] * 600, None)])
async def test_a_batch_has_a_model_where_all_its_lines_have_it(
    tmp_path: Path, models: list[str], told: str | None
) -> None:
    office = Office(tmp_path)
    async with office.desk() as desk:
        lines = [of_model(number, model) for number, model in enumerate(models)]
        assert (await ended(desk, await office.batch(desk, lines))).model == told
