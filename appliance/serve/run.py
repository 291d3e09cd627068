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

from appliance.api.app import AppDeps, create_app
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
from appliance.serve.http_server import (
    NodeServer,
    format_url,
    lock_data_dir,
    make_uvicorn_config,
    open_listener,
    reload_on_hangup,
    stop_server,
)
from appliance.serve.node import ReloadableNode
from appliance.serve.optional_services import NodeControl, build_supervisor, open_jobs, open_learning
from appliance.serve.startup_config import NodeSpec, locate_ledger
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


async def serve_node(
    spec: NodeSpec, read_spec: Callable[[], NodeSpec], announce: Callable[[RunningNode], None]
) -> None:
    """Run a node until SIGTERM or SIGINT; calls `announce` once it can answer. SIGHUP reloads: `read_spec` reads
    the configuration again.

    Raises LedgerUnavailable, EngineFailed and other OperatorErrors for what keeps it from starting.
    """
    config = spec.config
    setup_logging(config.log.level, config.log.format)
    async with AsyncExitStack() as stack:
        stack.enter_context(lock_data_dir(spec.home))
        listener = stack.enter_context(open_listener(config.server.host, config.server.port))
        control = await _start_control(spec, stack)
        node, app = await _start_data(spec, read_spec, control, stack)
        server = NodeServer(make_uvicorn_config(app, config))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        stack.push_async_callback(stop_server, server, serving)
        with server.stop_on_signals(signal.SIGTERM, signal.SIGINT), reload_on_hangup(node.reload):
            ready = asyncio.create_task(_wait_ready(control.supervisor, config, spec.configured))
            await asyncio.wait({ready, serving}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                ready.result()
                announce(_running(spec, listener))
            else:
                ready.cancel()
            await serving


async def _start_control(spec: NodeSpec, stack: AsyncExitStack) -> NodeControl:
    """Engines first, since they take longest; then what swaps, watches and meters them."""
    engine, state = spec.config.engine, State(time.monotonic)
    status = StatusPublisher(state, time.monotonic, spec.configured)
    status.set_configured_targets(spec.configured)
    supervisor = build_supervisor(spec, status)
    await supervisor.start(find_initially_unloaded(spec.placements, spec.pools))
    stack.push_async_callback(supervisor.stop)
    encoders = EncoderHost(supervisor, status, spec.home, engine.threads or len(os.sched_getaffinity(0)))
    stack.push_async_callback(encoders.aclose)
    await encoders.start_if_needed()
    rules = SwapRules(engine.idle_unload_seconds, engine.least_residence_seconds)
    models = [placement.model for placement in spec.placements]
    swapper = Swapper(supervisor, state, time.monotonic, spec.pools, rules, models)
    start_background_task(stack, "swapping", swapper.run, status)
    nvml = load_nvml()
    if nvml is not None:
        start_background_task(stack, "GPU watch", lambda: watch_gpus(status, nvml), status)
    meters = EnergyMeters.open(nvml)
    stack.callback(meters.close)
    sampler = EnergySampler(lambda: supervisor.engines, status, meters)
    start_background_task(stack, "metering", sampler.run, status)
    return NodeControl(state, Metrics(), status, supervisor, encoders)


async def _start_data(
    spec: NodeSpec, read_spec: Callable[[], NodeSpec], control: NodeControl, stack: AsyncExitStack
) -> tuple[ReloadableNode, FastAPI]:
    """Ledger, pipeline, jobs and the API over them."""
    state, metrics, status = control.state, control.metrics, control.status
    ledger = await Ledger.open(locate_ledger(spec.config, spec.home), retention_days=spec.config.ledger.retention_days)
    stack.push_async_callback(ledger.close)
    accounting = SpendAccounting(ledger, metrics, status, SpendCaps(spec.config, spec.policy, spec.keys))
    learning = await open_learning(spec, control, lambda: node.pipeline.policy, stack)
    node = ReloadableNode(spec, read_spec, state, status, accounting, learning)
    stack.push_async_callback(node.aclose)
    start_background_task(stack, "keys", lambda: node.follow_keys(ledger), status)
    task_fits = TaskCalibrationStore(spec.home / "task_fits.json")
    saved_tasks = SavedTasks(spec.home / "tasks")
    lines = LineRequests(node.auth, task_fits, saved_tasks)
    executor = LineExecutor(lines, lambda: node.pipeline)
    provider_lines = ProviderLines(lines, lambda: node.pipeline)
    jobs = await open_jobs(spec, control, executor, provider_lines, stack)
    app = create_app(
        AppDeps(
            pipeline=lambda: node.pipeline,
            auth=node.auth,
            state=state,
            ledger=ledger,
            metrics=metrics,
            server=spec.config.server,
            reload=node.reload,
            task_fits=task_fits,
            saved_tasks=saved_tasks,
            jobs=jobs,
            encoders=control.encoders,
            learning=learning,
        )
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


def _running(spec: NodeSpec, listener: socket.socket) -> RunningNode:
    hosted = tuple(target.name for target in spec.configured if target.location == "hosted")
    return RunningNode(format_url(listener), hosted, spec.policy.version, spec.policy_path, bool(spec.keys))
