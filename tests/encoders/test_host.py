"""The node's side: the program is started when there is work for it, and what it serves becomes rows."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import pytest

from appliance.config import EngineSettings
from appliance.core import Target
from appliance.engines.encoder import Encoder, has_encoder_work
from appliance.node.supervise.deps import SupervisorDeps
from appliance.node.supervise.encoder_host import EncoderHost
from appliance.node.supervise.launcher import ChildLauncher
from appliance.node.supervise.status import StatusPublisher
from appliance.node.supervise.supervisor import Supervisor
from appliance.router.routing.match import order_targets
from appliance.state import State
from tests.encoders.samples import labelled

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def host(home: Path) -> AsyncIterator[tuple[EncoderHost, State]]:
    state = State(time.monotonic)
    signals = StatusPublisher(state, time.monotonic)
    supervisor = Supervisor(
        [],
        SupervisorDeps(
            launcher=ChildLauncher(home / "logs"),
            status=signals,
            config=EngineSettings(),
            drain_seconds=5.0,
            runtime_folder=home / "run",
        ),
        {"encoder": Encoder()},
    )
    await supervisor.start()
    made = EncoderHost(supervisor, signals, home, 1)
    try:
        yield made, state
    finally:
        await made.aclose()
        await supervisor.stop()


async def test_nothing_is_started_where_there_is_nothing_to_do(tmp_path: Path) -> None:
    async with host(tmp_path) as (made, state):
        await made.start_if_needed()
        assert state.snapshot.engines == {}


def test_what_lies_in_the_folders_decides_whether_there_is_work(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "name" / "variant"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_text("")
    (folder / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    assert not has_encoder_work(tmp_path)
    (folder / "config.json").write_text("{}")
    assert has_encoder_work(tmp_path)


async def test_the_first_training_starts_the_program_and_ends_as_a_row_of_the_snapshot(tmp_path: Path) -> None:
    async with host(tmp_path) as (made, state):
        body = orjson.dumps({"name": "mail", "examples": labelled(60)})
        begun = await made.ask("POST", "/v1/classifiers", body)
        assert begun.status == 202, begun.body
        async with asyncio.timeout(60):
            while state.snapshot.target("classifier/mail") is None:
                await state.wait_for_change(5)
        target = state.snapshot.target("classifier/mail")
        assert target is not None
        assert target.abilities == {"classify", "decisions"}
        assert state.snapshot.target("onsite/encoders") is None, "the program itself is no model"
        assert state.snapshot.engines["classifier/mail"].state == "ready"
        assert (await made.ask("DELETE", "/v1/classifiers/mail")).status == 200
        assert state.snapshot.target("classifier/mail") is None


def test_a_place_names_no_classifier_and_its_own_name_does() -> None:
    def row(name: str, *abilities: str) -> Target:
        return Target(name, "onsite", "openai", "unix:/x", name, frozenset(abilities))  # type: ignore[arg-type]

    rows = [row("onsite/chat", "chat", "labels"), row("classifier/mail", "classify", "decisions")]
    assert [one.name for one in order_targets(["onsite"], rows)] == ["onsite/chat"]
    assert [one.name for one in order_targets(["classifier/mail", "onsite"], rows)] == [
        "classifier/mail",
        "onsite/chat",
    ]
