"""What a node changes while it runs: API keys made or revoked by command, and reloads, which change all or nothing."""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from appliance.config import KeySettings, NodeConfig
from appliance.errors import ConfigError, Unauthorized
from appliance.node.supervise.status import StatusPublisher
from appliance.router.accounting import SpendAccounting
from appliance.serve.node import ReloadableNode
from appliance.serve.startup_config import NodeSpec, build_node_spec
from appliance.state import State
from appliance.telemetry.background import TASK_FAILED, GuardedTask

pytestmark = pytest.mark.anyio


class Keys:
    """Keys as the ledger gives them. `fault` is raised by the next look."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)
        self.looks = 0
        self.fault: Exception | None = None

    async def read_keys_mark(self) -> tuple[Any, ...]:
        self.looks += 1
        if self.fault is not None:
            raise self.fault
        return (tuple(self.names),)

    async def list_keys(self) -> Sequence[KeySettings]:
        return [KeySettings(name=name, sha256=hashlib.sha256(name.encode()).hexdigest()) for name in self.names]


async def turn(_seconds: float) -> None:
    await asyncio.sleep(0)


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(2000):
        if holds():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not come to hold")


class Scene:
    def __init__(self, home: Path, keys: Keys, stored: Sequence[KeySettings]) -> None:
        self.state, self.keys = State(lambda: 0.0), keys
        self.signals = StatusPublisher(self.state, lambda: 0.0)
        spec = build_node_spec(NodeConfig(), home, ())
        self.spec = NodeSpec(
            spec.config, home, (), (), spec.policy, spec.policy_path, {}, tuple(stored), has_had_keys=True
        )
        accounting = cast(SpendAccounting, type("Accounting", (), {})())
        self.reread: Callable[[], NodeSpec] = lambda: self.spec
        self.node = ReloadableNode(self.spec, lambda: self.reread(), self.state, self.signals, accounting)

    def is_let_in(self, key: str) -> bool:
        try:
            self.node.auth.authenticate({"authorization": f"Bearer {key}"})
        except Unauthorized:
            return False
        return True

    @property
    def warnings(self) -> dict[str, str]:
        return {one.code: one.text for one in self.state.snapshot.warnings}


async def test_a_key_revoked_after_the_follower_failed_is_refused(tmp_path: Path) -> None:
    keys = Keys("ann", "bob")
    scene = Scene(tmp_path, keys, await keys.list_keys())
    follow = GuardedTask("keys", lambda: scene.node.follow_keys(keys, turn), scene.signals, sleep=turn)
    following = asyncio.create_task(follow.run())
    await until(lambda: keys.looks > 1)
    assert scene.is_let_in("ann")
    keys.fault = TypeError("a fault of ours")
    await until(lambda: TASK_FAILED in scene.warnings)
    keys.names.remove("ann")
    keys.fault = None
    await until(lambda: not scene.is_let_in("ann"))
    assert scene.is_let_in("bob")
    await until(lambda: TASK_FAILED not in scene.warnings)
    following.cancel()
    await scene.node.aclose()


async def test_a_key_revoked_before_the_first_look_is_refused(tmp_path: Path) -> None:
    keys = Keys("ann", "bob")
    scene = Scene(tmp_path, keys, await keys.list_keys())
    keys.names.remove("ann")
    following = asyncio.create_task(scene.node.follow_keys(keys, turn))
    await until(lambda: not scene.is_let_in("ann"))
    following.cancel()
    await scene.node.aclose()


@pytest.mark.parametrize("fault", [ConfigError("routes: unknown target"), TypeError("a fault of ours")])
async def test_a_reload_that_fails_is_on_the_health_page_whatever_failed(tmp_path: Path, fault: Exception) -> None:
    scene = Scene(tmp_path, Keys(), ())

    def fail() -> NodeSpec:
        raise fault

    scene.reread = fail
    with pytest.raises(type(fault)):
        await scene.node.reload()
    assert str(fault) in scene.warnings["reload_failed"]
    await scene.node.aclose()


async def test_a_reload_that_fails_halfway_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys("ann")
    scene = Scene(tmp_path, keys, await keys.list_keys())
    before = scene.node.pipeline
    scene.spec = replace(scene.spec, stored_keys=())

    def fail(*_: object, **__: object) -> None:
        raise TypeError("a fault of ours")

    monkeypatch.setattr("appliance.serve.node.Pipeline", fail)
    with pytest.raises(TypeError):
        await scene.node.reload()
    assert scene.is_let_in("ann")
    assert scene.node.pipeline is before
    await scene.node.aclose()
