"""Settings of the engines: which models are served, on how much memory, and what a variant may cost in quality."""

from typing import Literal

from pydantic import Field, model_validator

from appliance.config.strict import PositiveSeconds, Quality, StrictModel

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
