"""What a node can run without: jobs and learning. Where one cannot be opened, the health page says so."""

import os
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import structlog

from appliance.config import Policy
from appliance.engines.encoder import Encoder
from appliance.errors import ApplianceError, EngineFailed
from appliance.jobs.lines.executor import LineExecutor
from appliance.jobs.manager import JobManager
from appliance.jobs.metrics import JobMetrics
from appliance.jobs.provider.lines import ProviderLines
from appliance.node.plan.planner import ENGINE_ADAPTERS
from appliance.node.supervise.deps import SupervisorDeps
from appliance.node.supervise.encoder_host import EncoderHost
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


@dataclass(frozen=True, slots=True)
class NodeControl:
    """The control plane: what measures, starts and watches."""

    state: State
    metrics: Metrics
    status: StatusPublisher
    supervisor: Supervisor
    encoders: EncoderHost


def build_supervisor(spec: NodeSpec, status: StatusPublisher) -> Supervisor:
    found = load_vllm_adapters(spec.config.engine, spec.home, os.environ)
    for placement in spec.placements:
        if placement.engine == "vllm" and "vllm" not in found:
            raise EngineFailed(f"{placement.model} needs vLLM, which is not here: `appliance engines install vllm`")
    deps = SupervisorDeps(
        launcher=ChildLauncher(spec.home / "logs"),
        status=status,
        config=spec.config.engine,
        drain_seconds=spec.config.server.drain_seconds,
        runtime_folder=spec.home / "run",
        watts_per_busy_core=spec.config.cost.watts_per_busy_core,
    )
    return Supervisor(spec.placements, deps, {**ENGINE_ADAPTERS, "encoder": Encoder(), **found})


async def open_jobs(
    spec: NodeSpec, control: NodeControl, lines: LineExecutor, provider_lines: ProviderLines, stack: AsyncExitStack
) -> JobManager | None:
    """Files and batches; unfinished batches continue. None, and a warning, where they cannot be stored."""
    try:
        jobs = await JobManager.open(
            spec.config.jobs,
            spec.home,
            line_handler=lines,
            state=control.state,
            alerts=control.status,
            clock=time.monotonic,
            wall_clock=time.time,
            provider_lines=provider_lines,
        )
        stack.push_async_callback(jobs.aclose)
        await jobs.start()
    except (ApplianceError, OSError) as error:
        control.status.warn("jobs_unavailable", f"files and batches are not served: {error}")
        _log.error("files and batches are not served", reason=str(error))
        return None
    JobMetrics(jobs, control.metrics.registry)
    return jobs


async def open_learning(
    spec: NodeSpec, control: NodeControl, policy: Callable[[], Policy], stack: AsyncExitStack
) -> CascadeLearning | None:
    """What classifiers learn from. None, and a warning, where it cannot be stored: then no answer of theirs is used."""
    try:
        store = await LearningStore.open(spec.home / "learning.sqlite")
        learning = CascadeLearning(
            store,
            control.encoders,
            lambda: find_cascade_classifiers(policy()),
            control.status,
            spec.config.learning,
            wall=time.time,
            is_served=lambda name: control.state.snapshot.target(name) is not None,
        )
        stack.push_async_callback(learning.aclose)
        await learning.start()
    except ApplianceError as error:
        control.status.warn("learning_unavailable", f"what is known of classifiers' answers cannot be read: {error}")
        _log.error("labels are not kept", reason=str(error))
        return None
    LearningMetrics(learning, control.metrics.registry)
    start_background_task(stack, "learning", learning.run, control.status)
    return learning
