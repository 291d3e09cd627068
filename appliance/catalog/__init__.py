"""model_configs/ and hardware/ as frozen values: what can be served, from where, what a device can do.

Strict: an unknown key, a wrong type or a contradiction stops the load with file, line and field. What is measured on a
machine always overrides what stands here.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from appliance.catalog.devices import DevicePrior
from appliance.catalog.models import ModelSpec
from appliance.catalog.sources import (
    EngineKind,
    FileSource,
    HubSource,
    ModelFormat,
    PypiPart,
    PypiSource,
    Source,
    UrlSource,
    Variant,
)
from appliance.core.toml_positions import Location, dotted, line_of
from appliance.errors import ConfigError, UnknownModel

__all__ = [
    "Catalog",
    "DevicePrior",
    "EngineKind",
    "FileSource",
    "HubSource",
    "ModelFormat",
    "ModelSpec",
    "PypiPart",
    "PypiSource",
    "Source",
    "UrlSource",
    "Variant",
    "data_folder",
    "load_catalog",
    "load_device",
    "load_model",
]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Catalog:
    """Everything under model_configs/ and hardware/, in the order of the file names."""

    models: tuple[ModelSpec, ...]
    devices: tuple[DevicePrior, ...]

    @property
    def embedded(self) -> ModelSpec:
        """The model that a node pulls by itself when no other is configured."""
        return next(model for model in self.models if model.embedded)

    def get_model(self, name: str) -> ModelSpec:
        """The model called `name`; UnknownModel names the nearest ones."""
        for model in self.models:
            if model.name == name:
                return model
        names = [model.name for model in self.models]
        near = difflib.get_close_matches(name, names, n=3) or names
        raise UnknownModel(f"no model {name!r} in the catalogue; did you mean {', '.join(near)}?", param="model")

    def get_device(self, name: str) -> DevicePrior:
        """The device called `name`, with or without `gpu-` or `cpu-`; ConfigError names the nearest ones."""
        for device in self.devices:
            if name in (device.name, device.name.partition("-")[2]):
                return device
        names = [device.name for device in self.devices]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
        raise ConfigError(f"no device {name!r} under hardware/; did you mean {', '.join(near)}?")

    def find_cpu_prior(self, flags: frozenset[str]) -> DevicePrior | None:
        """The prior that asks most of a CPU and is met by `flags`; None if none is."""
        met = [device for device in self.devices if device.kind == "cpu" and flags.issuperset(device.flags)]
        return max(met, key=lambda device: len(device.flags), default=None)

    def find_gpu_prior(self, product_name: str) -> DevicePrior | None:
        """The prior whose name stands, as whole words, within the one that NVML reports; the longest such name counts.
        None if none does."""
        named = [
            (len(name), device)
            for device in self.devices
            for name in device.product_names
            if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", product_name, re.IGNORECASE)
        ]
        return max(named, key=lambda pair: pair[0])[1] if named else None


def load_catalog(extra_model_folders: Sequence[Path] = ()) -> Catalog:
    """Read the catalogue that came with the program, and the operator's own folders of model files.

    Raises ConfigError with file, line and field.
    """
    folders = [find_data_folder("model_configs"), *extra_model_folders]
    models = [load_model(path) for folder in folders for path in sorted(folder.glob("*.toml"))]
    devices = [load_device(path) for path in sorted(find_data_folder("hardware").glob("*.toml"))]
    seen: set[str] = set()
    for model in models:
        if model.name in seen:
            raise ConfigError(f"the model {model.name!r} stands in two files; rename one", field="name")
        seen.add(model.name)
    if sum(model.embedded for model in models) != 1:
        named = ", ".join(model.name for model in models if model.embedded) or "none"
        raise ConfigError(f"exactly one model must be embedded = true; it is set in: {named}", field="embedded")
    return Catalog(models=tuple(models), devices=tuple(devices))


def find_data_folder(name: Literal["model_configs", "hardware"]) -> Path:
    """Where the data files lie: beside the package in a checkout, inside it when it was installed."""
    package = Path(__file__).resolve().parent.parent
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
    return [*_contradictory_dimensions(spec, stem), *_contradictory_variants(spec)]


def _contradictory_dimensions(spec: ModelSpec, stem: str) -> Iterator[tuple[Location, str]]:
    if spec.name != stem:
        yield ("name",), f"is {spec.name!r}, but the file is called {stem!r}; they must be the same"
    if spec.heads % spec.kv_heads:
        yield ("kv_heads",), f"{spec.kv_heads} does not divide heads = {spec.heads}"
    if spec.sliding_layers + spec.linear_layers > spec.layers:
        field = "linear_layers" if spec.linear_layers else "sliding_layers"
        yield (field,), f"sliding_layers and linear_layers together are more than layers = {spec.layers}"
    for one, other, has_one, has_other in (
        ("sliding_layers", "sliding_window_tokens", spec.sliding_layers > 0, spec.sliding_window_tokens is not None),
        ("linear_layers", "state_bytes", spec.linear_layers > 0, spec.state_bytes > 0),
    ):
        if has_one != has_other:
            yield (one,), f"{one} and {other} are given together or not at all"


def _contradictory_variants(spec: ModelSpec) -> Iterator[tuple[Location, str]]:
    names: set[str] = set()
    for index, variant in enumerate(spec.variants):
        place: Location = ("variants", index)
        if variant.name in names:
            yield (*place, "name"), f"two variants are called {variant.name!r}"
        names.add(variant.name)
        if (variant.engine == "llamacpp") != (variant.format == "gguf"):
            yield (*place, "format"), "llamacpp reads gguf, vllm reads safetensors; one of the two is wrong"
        for number, source in enumerate(variant.sources):
            if isinstance(source, PypiSource) and any(
                (part.file is None) == variant.is_folder for part in source.parts
            ):
                yield (*place, "sources", number, "parts"), "parts name their `file` in a folder, and only there"
            if isinstance(source, HubSource) and not variant.is_folder and len(source.files) != 1:
                yield (*place, "sources", number, "files"), "a gguf variant is one file; name exactly one"


def _load(path: Path, adapter: TypeAdapter[_T]) -> tuple[_T, str]:
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
