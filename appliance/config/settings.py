"""The settings of the node: every table and field of the configuration file."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from appliance.config.engine_settings import EngineSettings
from appliance.config.provider_settings import NetworkSettings, Provider
from appliance.config.strict import Name, PositiveSeconds, StrictModel, Usd, check_residency
from appliance.core import Scope


class ServerSettings(StrictModel):
    """Where the HTTP API listens."""

    host: str = "127.0.0.1"
    """Address to listen on. Beyond loopback, API keys are required."""
    port: int = Field(default=8080, ge=0, le=65_535)
    """0 takes a free one."""
    max_body_bytes: int = Field(default=8_000_000, gt=0)
    """Longer request bodies get a 413."""
    max_connections: int = Field(default=1024, gt=0)
    """Connections served at once; more get a 503."""
    drain_seconds: PositiveSeconds = 30.0
    """How long running requests may take to finish after SIGTERM."""


class CostSettings(StrictModel):
    """What local work costs. The defaults are assumptions, and reports say so until they are set."""

    usd_per_kwh: Usd | None = None
    """Price of electricity; empty: 0.30 is assumed."""
    watts_per_busy_core: Usd | None = None
    """Extra power of a core at work; empty: 10 is assumed."""
    hardware_usd_per_hour: Usd = 0.0
    """Amortisation, charged for the seconds that the engine works."""


class LedgerSettings(StrictModel):
    """Where decisions and money are recorded. Empty: a SQLite file in the data directory."""

    url: str | None = None
    """An SQLAlchemy address; empty: a SQLite file in the data directory."""
    retention_days: int = Field(default=90, ge=1)
    """Decisions are removed after so many days."""


class LogSettings(StrictModel):
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is logged on stderr."""
    format: Literal["auto", "json", "console"] = "auto"
    """`auto`: plain text on a terminal, JSON elsewhere."""


class Budget(StrictModel):
    """Caps on what hosted calls may cost. They are hard: a call that could exceed one is not made."""

    daily_usd: Usd | None = None
    """Cap on hosted spend over all providers in one UTC day; empty: no limit."""
    alert_at: float = Field(default=0.8, gt=0, le=1)
    """The health page warns when this share of a cap is spent."""


class KeySettings(StrictModel):
    """An API key, stored as the SHA-256 of its text: `appliance keys create` prints such a row."""

    name: Name
    """The key's name; decisions are recorded under it."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the key's text, in hex."""
    scopes: tuple[Scope, ...] = ("client",)
    """What it may do; `admin` may read every decision and the metrics, and reload."""
    residency: str = "any"
    """Binds everything sent with this key: onsite, region:XX or any."""
    tier: str | None = None
    """A label of your own, for example `free` or `paid`."""
    routes: tuple[str, ...] | None = None
    """The only routes this key may use; empty: all."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """More get a 429 with the seconds to wait; empty: no limit."""
    daily_usd: Usd | None = None
    """What this key's requests may cost in hosted calls in one UTC day; empty: no limit."""

    _residency = field_validator("residency")(check_residency)


class JobsSettings(StrictModel):
    """Files and batches: work that can wait, done in capacity that nobody else wants."""

    folder: str | None = None
    """Folder of uploaded files and results; empty: `jobs` in the data directory."""
    url: str | None = None
    """An SQLAlchemy address for the tables of files, batches and lines; empty: a SQLite file in that folder."""
    max_file_bytes: int = Field(default=1_000_000_000, gt=0)
    """Longer uploads get a 413."""
    max_line_bytes: int = Field(default=8_000_000, gt=0)
    """Longer lines of a batch fail; the others go on."""
    max_lines: int = Field(default=200_000, gt=0)
    """A batch with more fails before it begins."""
    min_free_bytes: int = Field(default=500_000_000, ge=0)
    """With less free space on the disk uploads are refused and jobs pause."""
    retention_days: float = Field(default=30.0, gt=0)
    """Files and ended batches are removed after so many days, or sooner where they say so."""
    concurrency: int | None = Field(default=None, ge=1)
    """Calls in flight at once; empty: as many as keep the engines busy."""
    hosted_concurrency: int = Field(default=8, ge=1)
    """Calls in flight at once at hosted targets, for lines that would miss their deadline on-site."""
    provider_batch_seconds: float = Field(default=86_400.0, gt=0)
    """How long a provider's own batch may take. Lines are sent in one only while their deadline leaves this time and a
    tenth more. Lines that are not back by then are asked singly."""
    hours: tuple[str, ...] = ()
    """When jobs run, as `22:00-06:00` in the machine's time zone; empty: always."""

    @field_validator("hours")
    @classmethod
    def _are_hours(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            if not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d", text):
                raise ValueError(f"{text!r} is no span of time: write it as 22:00-06:00")
        return value


class LearningSettings(StrictModel):
    """What classifiers learn from traffic, on routes with a cascade."""

    retention_days: float = Field(default=90.0, gt=0)
    """Labels, and the texts that a route keeps, are removed after so many days."""
    max_texts: int = Field(default=200_000, ge=1)
    """Labelled texts kept of one classifier; beyond it the oldest are removed."""


class NodeConfig(StrictModel):
    """The whole configuration file."""

    data_dir: str | None = None
    """Models, ledger and logs; empty: `APPLIANCE_HOME`, else `~/.local/share/appliance`."""
    policy: str | None = None
    """Path of the policy file; empty: the one that comes with the appliance."""
    server: ServerSettings = ServerSettings()
    engine: EngineSettings = EngineSettings()
    cost: CostSettings = CostSettings()
    ledger: LedgerSettings = LedgerSettings()
    jobs: JobsSettings = JobsSettings()
    learning: LearningSettings = LearningSettings()
    budget: Budget = Budget()
    log: LogSettings = LogSettings()
    network: NetworkSettings = NetworkSettings()
    providers: tuple[Provider, ...] = ()
    keys: tuple[KeySettings, ...] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> "NodeConfig":
        for kind, rows in (("provider", self.providers), ("key", self.keys)):
            names = [row.name for row in rows]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{kind} {name!r} is defined twice")
        return self
