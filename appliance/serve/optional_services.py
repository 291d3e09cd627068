"""The rooms that a node can lack: what cannot be opened is said on the health page, and the rest is served."""

import os
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

import structlog

from appliance.config import Policy
from appliance.engines.encoder import Encoder
from appliance.errors import ApplianceError, EngineFailed
from appliance.jobs.lines.executor import LineExecutor
from appliance.jobs.manager import JobManager
from appliance.jobs.metrics import JobMetrics
from appliance.jobs.provider.lines import ProviderLines
from appliance.node.plan.planner import ENGINE_ADAPTERS
from appliance.node.supervise.encoder_host import EncoderHost
from appliance.node.supervise.engine_supervisor import SupervisorDeps
from appliance.node.supervise.launcher import ChildLauncher
from appliance.node.supervise.status import StatusPublisher
from appliance.node.supervise.supervisor import Supervisor
from appliance.node.vllm.environments import load_vllm_adapters
from appliance.quality.learning import CascadeLearning
from appliance.quality.metrics import LearningMetrics
from appliance.quality.store import LearningStore
from appliance.quality.traffic import find_cascade_classifiers
from appliance.serve.startup_config import NodeSpec
from appliance.state import State
from appliance.telemetry.background import start_background_task
from appliance.telemetry.metrics import Metrics

_log = structlog.get_logger(__name__)


def supervisor_of(site: NodeSpec, signals: StatusPublisher) -> Supervisor:
    found = load_vllm_adapters(site.config.engine, site.home, os.environ)
    for placement in site.placements:
        if placement.engine == "vllm" and "vllm" not in found:
            raise EngineFailed(f"{placement.model} needs vLLM, which is not here: `appliance engines install vllm`")
    deps = SupervisorDeps(
        launcher=ChildLauncher(site.home / "logs"),
        status=signals,
        config=site.config.engine,
        drain_seconds=site.config.server.drain_seconds,
        runtime_folder=site.home / "run",
        watts_per_busy_core=site.config.cost.watts_per_busy_core,
    )
    return Supervisor(site.placements, deps, {**ENGINE_ADAPTERS, "encoder": Encoder(), **found})


async def open_jobs(
    site: NodeSpec,
    lines: LineExecutor,
    provider_lines: ProviderLines,
    state: State,
    signals: StatusPublisher,
    metrics: Metrics,
    stack: AsyncExitStack,
) -> JobManager | None:
    """Files and batches, what was under way begun again; None, and a warning, where they cannot be kept."""
    try:
        jobs = await JobManager.open(
            site.config.jobs,
            site.home,
            line_handler=lines,
            state=state,
            alerts=signals,
            clock=time.monotonic,
            wall_clock=time.time,
            provider_lines=provider_lines,
        )
        stack.push_async_callback(jobs.aclose)
        await jobs.start()
    except (ApplianceError, OSError) as error:
        signals.warn("jobs_unavailable", f"files and batches are not served: {error}")
        _log.error("files and batches are not served", reason=str(error))
        return None
    JobMetrics(jobs, metrics.registry)
    return jobs


async def open_learning(
    site: NodeSpec,
    encoders: EncoderHost,
    policy: Callable[[], Policy],
    state: State,
    signals: StatusPublisher,
    metrics: Metrics,
    stack: AsyncExitStack,
) -> CascadeLearning | None:
    """What classifiers learn from; None, and a warning, where it cannot be kept: then no answer of theirs stands."""
    try:
        store = await LearningStore.open(site.home / "learning.sqlite")
        learning = CascadeLearning(
            store,
            encoders,
            lambda: find_cascade_classifiers(policy()),
            signals,
            site.config.learning,
            wall=time.time,
            is_served=lambda name: state.snapshot.target(name) is not None,
        )
        stack.push_async_callback(learning.aclose)
        await learning.start()
    except ApplianceError as error:
        signals.warn("learning_unavailable", f"what is known of classifiers' answers cannot be read: {error}")
        _log.error("labels are not kept", reason=str(error))
        return None
    LearningMetrics(learning, metrics.registry)
    start_background_task(stack, "learning", learning.run, signals)
    return learning
