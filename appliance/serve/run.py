"""A node from its first line to its last: what is started is stopped in the opposite order."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import structlog
from fastapi import FastAPI

from appliance.api.app import create_app
from appliance.config import NodeConfig
from appliance.core import Target
from appliance.errors import EngineFailed
from appliance.jobs.lines.executor import LineExecutor
from appliance.jobs.lines.requests import LineRequests
from appliance.jobs.provider.lines import ProviderLines
from appliance.ledger.store import Ledger
from appliance.node.energy.sampler import EnergyMeters, EnergySampler
from appliance.node.hardware.nvidia import load_nvml
from appliance.node.plan.swap import SwapRules, find_initially_unloaded
from appliance.node.supervise.encoder_host import EncoderHost
from appliance.node.supervise.gpu_watch import watch_gpus
from appliance.node.supervise.status import StatusPublisher
from appliance.node.supervise.supervisor import Supervisor
from appliance.node.supervise.swapper import Swapper
from appliance.router.accounting import SpendAccounting, SpendCaps
from appliance.serve.http_server import NodeServer, alone, ended, listening, reloads_on_hangup, url_of, uvicorn_config
from appliance.serve.node import ReloadableNode
from appliance.serve.optional_services import open_jobs, open_learning, supervisor_of
from appliance.serve.startup_config import NodeSpec, ledger_url
from appliance.state import State
from appliance.tasks.calibration_store import TaskCalibrationStore
from appliance.tasks.store import SavedTasks
from appliance.telemetry.background import start_background_task
from appliance.telemetry.logs import setup_logging
from appliance.telemetry.metrics import Metrics

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RunningNode:
    """What a node says of itself once it is ready. `hosted` are the names of hosted targets."""

    url: str
    hosted: tuple[str, ...]
    policy_version: str
    policy_path: Path
    needs_key: bool


@dataclass(frozen=True, slots=True)
class NodeControl:
    """The control plane: what measures, starts and watches."""

    state: State
    metrics: Metrics
    signals: StatusPublisher
    supervisor: Supervisor
    encoders: EncoderHost


async def serve(site: NodeSpec, reread: Callable[[], NodeSpec], announce: Callable[[RunningNode], None]) -> None:
    """Run a node until SIGTERM or SIGINT; calls `announce` once it can answer. SIGHUP reloads what `reread` gives.

    Raises LedgerUnavailable, EngineFailed and other OperatorErrors for what keeps it from starting.
    """
    config = site.config
    setup_logging(config.log.level, config.log.format)
    async with AsyncExitStack() as stack:
        stack.enter_context(alone(site.home))
        listener = stack.enter_context(listening(config.server.host, config.server.port))
        control = await _start_control(site, stack)
        node, app = await _start_data(site, reread, control, stack)
        server = NodeServer(uvicorn_config(app, config))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        stack.push_async_callback(ended, server, serving)
        with server.stops_on(signal.SIGTERM, signal.SIGINT), reloads_on_hangup(node.reload):
            ready = asyncio.create_task(_wait_ready(control.supervisor, config, site.configured))
            await asyncio.wait({ready, serving}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                ready.result()
                announce(_running(site, listener))
            else:
                ready.cancel()
            await serving


async def _start_control(site: NodeSpec, stack: AsyncExitStack) -> NodeControl:
    """Engines first, since they take longest; then what swaps, watches and meters them."""
    engine, state = site.config.engine, State(time.monotonic)
    signals = StatusPublisher(state, time.monotonic, site.configured)
    signals.set_configured_targets(site.configured)
    supervisor = supervisor_of(site, signals)
    await supervisor.start(find_initially_unloaded(site.placements, site.pools))
    stack.push_async_callback(supervisor.stop)
    encoders = EncoderHost(supervisor, signals, site.home, engine.threads or len(os.sched_getaffinity(0)))
    stack.push_async_callback(encoders.aclose)
    await encoders.start_if_needed()
    rules = SwapRules(engine.idle_unload_seconds, engine.least_residence_seconds)
    models = [placement.model for placement in site.placements]
    swapper = Swapper(supervisor, state, time.monotonic, site.pools, rules, models)
    start_background_task(stack, "swapping", swapper.run, signals)
    nvml = load_nvml()
    if nvml is not None:
        start_background_task(stack, "GPU watch", lambda: watch_gpus(signals, nvml), signals)
    meters = EnergyMeters.open(nvml)
    stack.callback(meters.close)
    sampler = EnergySampler(lambda: supervisor.engines, signals, meters)
    start_background_task(stack, "metering", sampler.run, signals)
    return NodeControl(state, Metrics(), signals, supervisor, encoders)


async def _start_data(
    site: NodeSpec, reread: Callable[[], NodeSpec], control: NodeControl, stack: AsyncExitStack
) -> tuple[ReloadableNode, FastAPI]:
    """Ledger, pipeline, jobs and the API over them."""
    state, metrics, signals = control.state, control.metrics, control.signals
    ledger = await Ledger.open(ledger_url(site.config, site.home), retention_days=site.config.ledger.retention_days)
    stack.push_async_callback(ledger.close)
    books = SpendAccounting(ledger, metrics, signals, SpendCaps(site.config, site.policy, site.keys))
    learning = await open_learning(site, control.encoders, lambda: node.pipeline.policy, state, signals, metrics, stack)
    node = ReloadableNode(site, reread, state, signals, books, learning)
    stack.push_async_callback(node.aclose)
    start_background_task(stack, "keys", lambda: node.follow_keys(ledger), signals)
    task_fits = TaskCalibrationStore(site.home / "task_fits.json")
    saved_tasks = SavedTasks(site.home / "tasks")
    lines = LineRequests(node.auth, task_fits, saved_tasks)
    executor = LineExecutor(lines, lambda: node.pipeline)
    provider_lines = ProviderLines(lines, lambda: node.pipeline)
    jobs = await open_jobs(site, executor, provider_lines, state, signals, metrics, stack)
    app = create_app(
        pipeline=lambda: node.pipeline,
        auth=node.auth,
        state=state,
        ledger=ledger,
        metrics=metrics,
        server=site.config.server,
        reload=node.reload,
        task_fits=task_fits,
        saved_tasks=saved_tasks,
        desk=jobs,
        encoders=control.encoders,
        learning=learning,
    )
    return node, app


async def _wait_ready(supervisor: Supervisor, config: NodeConfig, configured: tuple[Target, ...]) -> None:
    """Engines that fail end the start, unless hosted targets can answer in their place."""
    try:
        await supervisor.wait_ready(config.engine.start_seconds)
    except EngineFailed as error:
        if not configured:
            raise
        _log.error("the engine failed; requests that may leave the site are still answered", reason=str(error))


def _running(site: NodeSpec, listener: socket.socket) -> RunningNode:
    hosted = tuple(target.name for target in site.configured if target.location == "hosted")
    return RunningNode(url_of(listener), hosted, site.policy.version, site.policy_path, bool(site.keys))
