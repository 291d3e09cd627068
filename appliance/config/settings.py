"""The settings of the node: every table and field of the configuration file."""

import ipaddress
import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from appliance.config.providers import (
    KEY_HEADERS,
    KINDS,
    ProviderKind,
    check_abilities,
    check_address,
    check_batches,
    kind_of,
)
from appliance.config.strict import Name, PositiveSeconds, Quality, StrictModel, Usd, check_residency
from appliance.core import Ability, Api, Dialect, Location, Scope, Thinking


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


Workload = Literal["balanced", "prefill", "decode"]


class ToleranceSettings(StrictModel):
    """How near a variant that was derived here must come to its source, or it is not used however quick it is."""

    label_agreement: float = Field(default=0.97, ge=0, le=1)
    """At least this share of built-in questions must get the same label from a derived variant as from its source, or
    one that the source finds nearly as likely (within a quarter of a nat). One question may differ, unless this is
    1."""
    median_kl: float = Field(default=0.02, ge=0)
    """Largest median divergence of next-token distributions between a derived variant and its source, in nats."""


class EngineModel(StrictModel):
    """One of several models, with what is to hold for it alone. Whatever is left out is planned."""

    name: str = Field(min_length=1)
    """A catalogue name, the path of a GGUF file, or a folder with safetensors and config.json."""
    path: str | None = None
    """Its path, if `name` is a name of your own."""
    variant: str | None = None
    """One of its variants; empty: the most precise that fits well."""
    engine: Literal["llamacpp", "vllm"] | None = None
    """Empty: vLLM where a GPU has room for it, else llama.cpp."""
    gpus: tuple[int, ...] | None = None
    """Indices of the devices it may use; empty: any."""
    tensor_parallel: int | None = Field(default=None, ge=1, le=64)
    """Devices that one copy is split over; empty: the fewest it fits on."""
    data_parallel: int | None = Field(default=None, ge=1, le=64)
    """Copies; empty: one, or as many as free devices can hold."""
    context_tokens: int | None = Field(default=None, ge=256)
    """The longest one sequence may become (of llama.cpp: all of them together)."""
    sequences: int | None = Field(default=None, ge=1, le=4096)
    """Requests computed at once."""
    kv_dtype: Literal["auto", "fp8"] = "auto"
    """fp8 holds twice the tokens, where the device can (compute capability 8.9), with slightly other answers."""
    gpu_memory_share: float | None = Field(default=None, gt=0, le=0.98)
    """Largest share of each device's memory; empty: what the other models leave."""
    quality: Quality | None = None
    """How good its answers are, from 0 to 1 on your own scale; empty: the catalogue's figure."""
    options: tuple[str, ...] = ()
    """Further options of its engine, as its command line takes them."""


class EngineSettings(StrictModel):
    """The CPU engine. Whatever is left out is planned from what the machine has."""

    model: str = "smollm2-135m-instruct"
    """A catalogue name, or the path of a GGUF file."""
    variant: str | None = None
    """One of the model's variants; empty: one that is in the data directory, else its first, or the one measured to be
    quickest."""
    threads: int | None = Field(default=None, gt=0)
    """Threads of the CPU engine; empty: the number measured to be quickest, else the cores this process may use."""
    workload: Workload = "balanced"
    """What the engine mostly does: prefill (decisions, extraction), decode (writing), or both. It decides between
    variants that answer alike."""
    calibrate: bool = True
    """Whether a first start measures variants and thread counts for about half a minute."""
    tolerance: ToleranceSettings = ToleranceSettings()
    models: tuple[EngineModel, ...] = ()
    """Several models, each with settings of its own. With these, `model` is served only if it is set."""
    idle_unload_seconds: PositiveSeconds | None = None
    """A model that was not used for so long is unloaded until it is wanted; empty: never."""
    least_residence_seconds: PositiveSeconds = 60.0
    """A loaded model stays for at least so long, even if another model needs its memory: swapping costs more than
    waiting."""
    vllm: str | None = None
    """Folder of the environment vLLM is in; empty: the newest of `appliance engines list`, else `vllm` on the PATH."""
    vllm_options: tuple[str, ...] = ()
    """Further options of vLLM, as its command line takes them: `["--enforce-eager"]`, `["--dtype", "float16"]`."""
    context_tokens: int | None = Field(default=None, ge=256)
    """KV cells shared by all sequences."""
    sequences: int | None = Field(default=None, ge=1, le=256)
    """Requests computed at once."""
    quality: Quality | None = None
    """How good its answers are, from 0 to 1 on your own scale; empty: the catalogue's figure, if it has one."""
    max_queued_requests: int = Field(default=256, ge=1)
    """Length of the engine's own queue. A backstop: the node queues before it."""
    start_seconds: PositiveSeconds = 300.0
    """An engine that is not ready after so long has failed."""
    stall_seconds: PositiveSeconds = 60.0
    """No token for this long while work is waiting: the engine counts as hung and is restarted."""

    @property
    def wanted_models(self) -> tuple[EngineModel, ...]:
        """Everything that is to be served, in the order in which it is placed: `model`, then `models`."""
        if self.models and "model" not in self.model_fields_set:
            return self.models
        first = EngineModel(
            name=self.model,
            variant=self.variant,
            context_tokens=self.context_tokens,
            sequences=self.sequences,
            quality=self.quality,
        )
        return (first, *self.models)

    @model_validator(mode="after")
    def _names_are_unique(self) -> "EngineSettings":
        names = [one.name for one in self.wanted_models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the model {name!r} is wanted twice: keep one")
        return self


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


class NetworkSettings(StrictModel):
    """Addresses that belong to this site besides loopback and unix sockets."""

    onsite: tuple[str, ...] = ()
    """Networks in CIDR form. On-site servers must have an address in one of them."""

    @field_validator("onsite")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            ipaddress.ip_network(text)
        return value


class ProviderModel(StrictModel):
    """One model of a provider, with its price in US dollars per million tokens."""

    name: str = Field(min_length=1)
    """The provider's name for it; the target is `PROVIDER/NAME`."""
    abilities: tuple[Ability, ...] | None = None
    """What it can do; requests that need more are not sent to it. Empty: the usual abilities of its kind: `chat`,
    `json_schema` and `tools`, and mostly `completions` and `logprobs`; never `vision` or `reasoning`."""
    context_tokens: int | None = Field(default=None, gt=0)
    """Longer prompts are not sent to it; empty: not known, not checked."""
    input_usd: Usd | None = None
    """US dollars per million prompt tokens. Required where hosted: unknown is not free."""
    cached_input_usd: Usd | None = None
    """US dollars per million cached prompt tokens; empty: as `input_usd`."""
    output_usd: Usd | None = None
    """US dollars per million completion tokens. Required where hosted."""
    cache_write_usd: Usd | None = None
    """US dollars per million prompt tokens that the provider writes to its cache; empty: the kind's usual multiple of
    `input_usd`."""
    batch_discount: float | None = Field(default=None, gt=0, lt=1)
    """How much cheaper requests are in the provider's own batches, as a share (0.5: half the price). Empty: unknown,
    so jobs never use them."""
    api: Api = "chat"
    """`responses` for a model that speaks only OpenAI's Responses API."""
    thinking: Thinking = "effort"
    """How the amount of thinking is sent: as an `effort`, or as a `budget` of tokens (Claude before 4.6, Gemini
    2.5)."""
    max_output_tokens: int | None = Field(default=None, gt=0)
    """The longest answer. Anthropic and Gemini get it as the limit where the request has none (empty: 8,192 to
    Anthropic, which needs one). It is reserved from budgets for every call without a limit."""
    leaves_out: tuple[str, ...] = ()
    """Fields that this model does not take and that are left out of requests, for example `temperature`."""
    refuses: tuple[str, ...] = ()
    """Fields that this model does not take; requests that have one are not sent to it."""
    quality: Quality | None = None
    """How good its answers are, from 0 to 1 on your own scale, for the quality floors and scores of routes."""


class ProviderLimits(StrictModel):
    connect_seconds: PositiveSeconds = 5.0
    """Longest time to connect."""
    first_byte_seconds: PositiveSeconds = 60.0
    """Longest time from sending to the first byte."""
    between_tokens_seconds: PositiveSeconds = 30.0
    """The longest silence inside a stream."""


class Provider(StrictModel):
    """A server somebody else runs, or another server of this site (`location = "onsite"`)."""

    name: Name
    """Its name, and the first part of its targets' names."""
    kind: ProviderKind | None = None
    """Which provider's differences apply; empty: the one that its address belongs to, else `compatible`."""
    dialect: Dialect | None = None
    """The wire format it speaks; empty: its kind's."""
    location: Location = "hosted"
    """`onsite` for a server of your own; its address must then lie on-site."""
    region: str | None = Field(default=None, pattern=r"^[A-Z]{2}(-[A-Z0-9]{1,8})?$")
    """Region in which it computes, for example `EU`. Without one it gets no region-bound request."""
    base_url: str | None = Field(default=None, pattern=r"^https?://\S+[^/\s]$")
    """Up to and including the version, for example `https://host/v1`. Empty: its kind's own, where that is known."""
    api_version: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    """Azure: the `api-version` of its address. Anthropic: the `anthropic-version`; empty: 2026-10-21, which takes no
    `temperature`, `top_p` or `top_k`; `2023-06-01` does."""
    headers: dict[str, str] = Field(default={})
    """Headers to send with every call, for example an organisation's id. Never a key: that belongs in key_env."""
    key_env: str | None = None
    """Environment variable that holds its API key."""
    key_file: str | None = None
    """File that holds its API key, instead of a variable."""
    models: tuple[ProviderModel, ...] = Field(min_length=1)
    limits: ProviderLimits = ProviderLimits()
    daily_usd: Usd | None = None
    """What this provider may cost in one UTC day; empty: no limit."""

    @field_validator("headers")
    @classmethod
    def _are_no_keys(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if name.lower() in KEY_HEADERS:
                raise ValueError(f"{name} is where the key goes: set key_env or key_file")
            if not re.fullmatch(r"[A-Za-z0-9-]+", name) or not re.fullmatch(r"[\x20-\x7e]*", text):
                raise ValueError(f"{name!r} is no header of plain text")
        return value

    @property
    def is_kind(self) -> ProviderKind:
        """Its kind, as said or as found by its address."""
        return kind_of(self.kind, self.dialect, self.base_url or "")

    @property
    def address(self) -> str:
        """Its base URL, as said or its kind's own."""
        return self.base_url or KINDS[self.is_kind].base_url or ""

    @model_validator(mode="after")
    def _speaks_to_a_sound_address(self) -> "Provider":
        if not self.address:
            raise ValueError("base_url is missing: up to and including the version, for example https://host/v1")
        check_address(self.is_kind, self.address, self.api_version)
        for model in self.models:
            check_abilities(self.is_kind, model.name, model.abilities or ())
            check_batches(self.is_kind, model.name, model.batch_discount)
        return self

    @model_validator(mode="after")
    def _is_consistent(self) -> "Provider":
        if self.name == "onsite":
            raise ValueError("a provider cannot be named 'onsite': that name means this node's own engines")
        if self.key_env and self.key_file:
            raise ValueError("key_env and key_file are both set: keep one")
        if self.location == "hosted":
            for model in self.models:
                if model.input_usd is None or model.output_usd is None:
                    raise ValueError(
                        f"model {model.name!r} has no price: set input_usd and output_usd (unknown is not free)"
                    )
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            raise ValueError("a model is listed twice")
        return self


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
