"""The composition root: every room is built here, started in order, and stopped in the opposite order."""

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog
import uvicorn

from appliance.api.app import create_app
from appliance.api.auth import Authenticator, is_loopback
from appliance.api.bulk import BulkLines
from appliance.api.connection import Connection
from appliance.api.lines import Lines
from appliance.api.task_fits import TaskFits
from appliance.api.task_store import SavedTasks
from appliance.backends.base import Doors
from appliance.backends.egress import EgressDoor
from appliance.backends.local import LocalDoor
from appliance.config import DEFAULT_POLICY_PATH, Key, NodeConfig, Policy, load_policy, provider_targets, read_secret
from appliance.core import Target
from appliance.engines.base import Placement
from appliance.engines.encoder import Encoder
from appliance.errors import ApplianceError, ConfigError, EngineFailed, LedgerUnavailable, OperatorError
from appliance.jobs.desk import Desk
from appliance.jobs.measures import JobMeasures
from appliance.ledger.database import sqlite_url
from appliance.ledger.keys import list_keys
from appliance.ledger.store import Ledger
from appliance.node.encoders import EncoderHost
from appliance.node.energy_sampler import EnergySampler, Meters
from appliance.node.gpu_watch import watch_gpus
from appliance.node.launcher import ChildLauncher
from appliance.node.nvidia import load_nvml
from appliance.node.planner import ENGINES
from appliance.node.signals import Signals
from appliance.node.supervisor import Supervisor
from appliance.node.swap import Rules, pools_of, resting_at_first
from appliance.node.swapper import Swapper
from appliance.node.vllm_environments import launchable
from appliance.pipeline.admission import Admission
from appliance.pipeline.answer import Pipeline
from appliance.pipeline.books import Books, Caps
from appliance.pipeline.breaker import Breakers
from appliance.pipeline.inspection import Detector, detector_for
from appliance.pipeline.means import Memory
from appliance.pipeline.profile import check_profiler
from appliance.pipeline.residency import PermitOffice
from appliance.quality.learning import Learning
from appliance.quality.measures import LearningMeasures
from appliance.quality.store import Store
from appliance.quality.traffic import lessons_of
from appliance.state import State
from appliance.telemetry.logs import setup_logging
from appliance.telemetry.metrics import Metrics

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Site:
    """What a node is started with. `home` is the data directory, `secrets` are the providers' keys by name."""

    config: NodeConfig
    home: Path
    placements: tuple[Placement, ...]
    configured: tuple[Target, ...]
    policy: Policy
    policy_path: Path
    secrets: Mapping[str, str] = field(repr=False)
    stored_keys: tuple[Key, ...] | None = ()
    """API keys made by command; those of the configuration are in `config`. None where they could not be read."""
    pools: Mapping[str, int] = field(default_factory=dict)
    """Bytes that all models of a pool of memory may hold together (`swap.pools_of`)."""
    detector: Detector | None = None
    """Of personal data, where the policy wants requests searched."""
    has_had_keys: bool = False
    """Whether any key was ever made by command, revoked ones included: then nobody is anonymous."""

    @property
    def keys(self) -> Mapping[str, Key]:
        """By name; the configuration's win."""
        return {key.name: key for key in (*(self.stored_keys or ()), *self.config.keys)}


@dataclass(frozen=True, slots=True)
class Running:
    """What a node says of itself once it is ready. `hosted` are the names of hosted targets."""

    url: str
    hosted: tuple[str, ...]
    policy_version: str
    policy_path: Path
    needs_key: bool


def ledger_url(config: NodeConfig, home: Path) -> str:
    """Where the ledger lies: the configured database, else a file in the data directory."""
    return config.ledger.url or sqlite_url(home / "ledger.sqlite")


def prepare(
    config: NodeConfig, home: Path, placements: tuple[Placement, ...], pools: Mapping[str, int] | None = None
) -> Site:
    """Read everything that a start depends on. `pools`: bytes that models may hold together; None: all fit.

    Raises ConfigError for what contradicts itself or is missing.
    """
    configured = provider_targets(config)
    policy_path = Path(config.policy).expanduser() if config.policy else DEFAULT_POLICY_PATH
    policy = load_policy(policy_path, [*configured, *(placed.target for placed in placements)])
    secrets = {one.name: secret for one in config.providers if (secret := read_secret(one)) is not None}
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the data directory {home}: {error.strerror}; choose another one") from error
    stored, has_had_keys = _stored_keys(config, home)
    if not config.keys and not stored and not is_loopback(config.server.host):
        raise ConfigError(
            f"listening on {config.server.host} lets others in, so API keys are needed: make one with "
            "`appliance keys create NAME` (with the same data directory), or listen on 127.0.0.1",
            field="server.host",
        )
    detector = detector_for(policy)
    check_profiler(policy.defaults.profiler)
    if pools is None:
        whole = sum(one.memory.total_bytes for one in placements)
        pools = {pool: whole for one in placements for pool in pools_of(one)}
    return Site(
        config,
        home,
        placements,
        configured,
        policy,
        policy_path,
        secrets,
        stored,
        pools=pools,
        detector=detector,
        has_had_keys=has_had_keys,
    )


def _stored_keys(config: NodeConfig, home: Path) -> tuple[tuple[Key, ...] | None, bool]:
    """API keys made by command, and whether there ever were any. None where there is no ledger yet, or it cannot be
    read (said when it is opened)."""
    try:
        stored = list_keys(ledger_url(config, home))
    except LedgerUnavailable:
        return None, False
    return tuple(one.key for one in stored if one.revoked_at is None), bool(stored)


class Node:
    """The half of a node that a reload replaces: policy, providers with their prices and keys, API keys.

    Engines, ledger, admission, breakers and what was learned of targets go on; requests that have begun keep the
    pipeline they began with. Everything is called on the event loop.
    """

    def __init__(
        self,
        site: Site,
        reread: Callable[[], Site],
        state: State,
        signals: Signals,
        books: Books,
        learning: Learning | None = None,
    ) -> None:
        self._site, self._reread, self._learning = site, reread, learning
        self._state, self._signals, self._books = state, signals, books
        self._office, self._breakers, self._memory = PermitOffice(), Breakers(), Memory()
        self._admission = Admission(state, time.monotonic, self._memory.experience)
        self._retired: list[Doors] = []
        self._changing = asyncio.Lock()
        """What was read first comes into force first: an older reading never replaces a newer one."""
        self._doors = self._make_doors(site)
        host = site.config.server.host
        self.auth = Authenticator(tuple(site.keys.values()), host=host, has_had_keys=site.has_had_keys)
        self.pipeline = self._make_pipeline(site)

    async def reload(self) -> Mapping[str, Any]:
        """Read configuration and policy again and use them from the next request on.

        Says what is in force and which changed settings wait for a restart. Raises ConfigError for a mistake, and then
        all stays as it was.
        """
        async with self._changing:
            try:
                site = await asyncio.to_thread(self._reread)
            except ConfigError as error:
                self._signals.warn("reload_failed", f"the old settings stay in force: {error}")
                _log.error("reload failed; the old settings stay in force", reason=str(error))
                raise
            return self._replace(site)

    def _replace(self, site: Site) -> Mapping[str, Any]:
        if site.stored_keys is None:
            # An unreadable ledger must not take away keys: with them would go what binds their requests.
            site = replace(site, stored_keys=self._site.stored_keys)
        old, self._site = self._site.config, site
        if (
            site.config.providers != old.providers
            or site.secrets != self._doors_secrets
            or site.config.network != old.network
        ):
            # Requests under way still hold the old doors; they are closed when the node stops.
            self._retired.append(self._doors)
            self._doors = self._make_doors(site)
        self._signals.set_configured(site.configured)
        self._use(site)
        self.pipeline = self._make_pipeline(site)
        self._signals.clear("reload_failed")
        waiting = [name for name in _FIXED if getattr(site.config, name) != getattr(old, name)]
        _log.info("reloaded", policy=site.policy.version, needs_restart=waiting)
        return {"policy_version": site.policy.version, "policy": str(site.policy_path), "needs_restart": waiting}

    def _use(self, site: Site) -> None:
        self._site = site
        self.auth.load(tuple(site.keys.values()))
        self._books.caps = Caps(site.config, site.policy, site.keys)

    async def follow_keys(self, ledger: Ledger) -> None:
        """Use keys that are made or revoked by command while the node runs. Runs until cancelled."""
        known: tuple[Any, ...] | None = None
        while True:
            with contextlib.suppress(LedgerUnavailable):  # the health page says so; keys stay as they are
                async with self._changing:
                    mark = await ledger.keys_mark()
                    if known is not None and mark != known:
                        self._use(replace(self._site, stored_keys=tuple(await ledger.keys())))
                    known = mark
            await asyncio.sleep(_KEYS_SECONDS)

    async def aclose(self) -> None:
        await self._admission.aclose()
        for doors in (*self._retired, self._doors):
            await doors.local.aclose()
            if doors.egress is not None:
                await doors.egress.aclose()

    def _make_doors(self, site: Site) -> Doors:
        """What leads to targets. Without a hosted provider there is only the local door."""
        config, self._doors_secrets = site.config, site.secrets
        hosted = {one.name: one.address for one in config.providers if one.location == "hosted"}
        onsite_secrets = {name: secret for name, secret in site.secrets.items() if name not in hosted}
        local = LocalDoor(config.network.onsite, onsite_secrets)
        if not hosted:
            return Doors(local)
        secrets = {name: secret for name, secret in site.secrets.items() if name in hosted}
        return Doors(local, EgressDoor(hosted, secrets, self._office.key))

    def _make_pipeline(self, site: Site) -> Pipeline:
        return Pipeline(
            policy=site.policy,
            config=site.config,
            detector=site.detector,
            state=self._state,
            ledger=self._books,
            admission=self._admission,
            breakers=self._breakers,
            memory=self._memory,
            doors=self._doors,
            permits=self._office,
            alerts=self._signals,
            learning=self._learning,
        )


_KEYS_SECONDS = 2.0
"""How soon a key that is made or revoked by command counts."""
_FIXED = ("data_dir", "server", "engine", "ledger", "jobs", "learning", "log")
"""Settings that are read at start alone."""


async def serve(site: Site, reread: Callable[[], Site], announce: Callable[[Running], None]) -> None:
    """Run a node until SIGTERM or SIGINT; calls `announce` once it can answer. SIGHUP reloads what `reread` gives.

    Raises LedgerUnavailable, EngineFailed and other OperatorErrors for what keeps it from starting.
    """
    config, configured = site.config, site.configured
    setup_logging(config.log.level, config.log.format)
    async with AsyncExitStack() as stack:
        stack.enter_context(_alone(site.home))
        listener = stack.enter_context(_listener(config.server.host, config.server.port))
        state, metrics = State(time.monotonic), Metrics()
        signals = Signals(state, time.monotonic, configured)
        signals.set_configured(configured)
        supervisor = _supervisor(site, signals)
        # The engine takes longest, so it starts first.
        await supervisor.start(resting_at_first(site.placements, site.pools))
        stack.push_async_callback(supervisor.stop)
        encoders = EncoderHost(supervisor, signals, site.home, config.engine.threads or len(os.sched_getaffinity(0)))
        stack.push_async_callback(encoders.aclose)
        await encoders.start_if_needed()
        rules = Rules(config.engine.idle_unload_seconds, config.engine.least_residence_seconds)
        models = [placement.model for placement in site.placements]
        swapper = Swapper(supervisor, state, time.monotonic, site.pools, rules, models)
        swapping = asyncio.create_task(swapper.run())
        stack.callback(swapping.cancel)
        nvml = load_nvml()
        if nvml is not None:
            watching = asyncio.create_task(watch_gpus(signals, nvml))
            stack.callback(watching.cancel)
        sampler = EnergySampler(lambda: supervisor.keepers, signals, Meters.open(nvml))
        metering = asyncio.create_task(sampler.run())
        stack.callback(metering.cancel)
        ledger = await Ledger.open(ledger_url(config, site.home), retention_days=config.ledger.retention_days)
        stack.push_async_callback(ledger.close)
        books = Books(ledger, metrics, signals, Caps(config, site.policy, site.keys))
        learning = await _learning(site, encoders, lambda: node.pipeline.policy, state, signals, metrics, stack)
        node = Node(site, reread, state, signals, books, learning)
        stack.push_async_callback(node.aclose)
        following = asyncio.create_task(node.follow_keys(ledger))
        stack.callback(following.cancel)
        task_fits = TaskFits(site.home / "task_fits.json")
        saved_tasks = SavedTasks(site.home / "tasks")
        lines = Lines(pipeline=lambda: node.pipeline, auth=node.auth, fits=task_fits, saved=saved_tasks)
        desk = await _desk(site, lines, BulkLines(lines, lambda: node.pipeline), state, signals, metrics, stack)
        app = create_app(
            pipeline=lambda: node.pipeline,
            auth=node.auth,
            state=state,
            ledger=ledger,
            metrics=metrics,
            server=config.server,
            reload=node.reload,
            task_fits=task_fits,
            saved_tasks=saved_tasks,
            desk=desk,
            encoders=encoders,
            learning=learning,
        )
        server = Server(_uvicorn_config(app, config))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        stack.push_async_callback(_ended, server, serving)
        with server.stops_on(signal.SIGTERM, signal.SIGINT), _reloads_on_hangup(node):
            ready = asyncio.create_task(_wait_ready(supervisor, config, configured))
            await asyncio.wait({ready, serving}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                ready.result()
                hosted = tuple(target.name for target in configured if target.location == "hosted")
                announce(Running(_url(listener), hosted, site.policy.version, site.policy_path, bool(site.keys)))
            else:
                ready.cancel()
            await serving


async def _desk(
    site: Site,
    lines: Lines,
    bulk: BulkLines,
    state: State,
    signals: Signals,
    metrics: Metrics,
    stack: AsyncExitStack,
) -> Desk | None:
    """Files and batches, what was under way begun again; None, and a warning, where they cannot be kept."""
    try:
        desk = await Desk.open(
            site.config.jobs,
            site.home,
            answering=lines,
            state=state,
            alerts=signals,
            clock=time.monotonic,
            wall=time.time,
            posting=bulk,
        )
        stack.push_async_callback(desk.aclose)
        await desk.start()
    except (ApplianceError, OSError) as error:
        signals.warn("jobs_unavailable", f"files and batches are not served: {error}")
        _log.error("files and batches are not served", reason=str(error))
        return None
    JobMeasures(desk, metrics.registry)
    return desk


async def _learning(
    site: Site,
    encoders: EncoderHost,
    policy: Callable[[], Policy],
    state: State,
    signals: Signals,
    metrics: Metrics,
    stack: AsyncExitStack,
) -> Learning | None:
    """What classifiers learn from; None, and a warning, where it cannot be kept: then no answer of theirs stands."""
    try:
        store = await Store.open(site.home / "learning.sqlite")
        learning = Learning(
            store,
            encoders,
            lambda: lessons_of(policy()),
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
    LearningMeasures(learning, metrics.registry)
    tending = asyncio.create_task(learning.run(), name="learning")
    stack.push_async_callback(_cancelled, tending)
    return learning


async def _cancelled(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait({task})


class Server(uvicorn.Server):
    """uvicorn, stopped by us: its own signal handling would end the process before the engines are drained."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def stops_on(self, *numbers: signal.Signals) -> Iterator[None]:
        """The first signal drains, a second one stops waiting for requests that are still running."""
        loop = asyncio.get_running_loop()

        def stop() -> None:
            self.force_exit = self.should_exit
            self.should_exit = True

        for number in numbers:
            loop.add_signal_handler(number, stop)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


@contextlib.contextmanager
def _reloads_on_hangup(node: Node) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    async def reload() -> None:
        with contextlib.suppress(ConfigError):  # logged, and on the health page
            await node.reload()

    def hangup() -> None:
        task = loop.create_task(reload())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    loop.add_signal_handler(signal.SIGHUP, hangup)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


async def _ended(server: Server, serving: "asyncio.Task[None]") -> None:
    server.should_exit = True
    await asyncio.wait({serving})


async def _wait_ready(supervisor: Supervisor, config: NodeConfig, configured: tuple[Target, ...]) -> None:
    """Engines that fail end the start, unless hosted targets can answer in their place."""
    try:
        await supervisor.wait_ready(config.engine.start_seconds)
    except EngineFailed as error:
        if not configured:
            raise
        _log.error("the engine failed; requests that may leave the site are still answered", reason=str(error))


def _supervisor(site: Site, signals: Signals) -> Supervisor:
    found = launchable(site.config.engine, site.home, os.environ)
    for placement in site.placements:
        if placement.engine == "vllm" and "vllm" not in found:
            raise EngineFailed(f"{placement.model} needs vLLM, which is not here: `appliance engines install vllm`")
    return Supervisor(
        site.placements,
        launcher=ChildLauncher(site.home / "logs"),
        signals=signals,
        config=site.config.engine,
        drain_seconds=site.config.server.drain_seconds,
        runtime_folder=site.home / "run",
        watts_per_busy_core=site.config.cost.watts_per_busy_core,
        engines={**ENGINES, "encoder": Encoder(), **found},
    )


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """One node a data directory: two would share a ledger file, logs and sockets without knowing of each other."""
    try:
        lock = (home / "node.lock").open("w")
    except OSError as error:
        raise OperatorError(f"cannot write in {home}: {error.strerror}; choose another --data-dir") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OperatorError(f"another node is using {home}; stop it, or choose another --data-dir") from error
        yield


@contextlib.contextmanager
def _listener(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket, before anything slow is started: a port in use is said at once."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OperatorError(f"cannot listen on {host!r}: {error.strerror or error}; choose another --host") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise OperatorError(
                f"cannot listen on {host} port {port}: {error.strerror}; end what listens there, or choose another port"
            ) from error
        yield listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _uvicorn_config(app: object, config: NodeConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=config.server.max_connections,
        timeout_graceful_shutdown=int(config.server.drain_seconds),
    )
