"""From what the operator named to what is planned for: a catalogue name, or files of their own; and from what was
measured to the variant that is served."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from appliance.catalog import Catalog, FileSource, ModelSpec, Variant
from appliance.config import EngineModel, EngineSettings
from appliance.errors import ModelFileError, UnknownModel
from appliance.node.calibrate.calibration import Calibration, choose_variant
from appliance.node.models.gguf_header import build_gguf_spec, read_gguf_header
from appliance.node.models.hf_folder import read_folder_spec
from appliance.node.models.model_store import ModelStore, StoredModel
from appliance.node.plan.models import ModelCandidate


def read_gguf_candidate(path: Path) -> ModelCandidate:
    """A GGUF that need not be in the catalogue. Raises ModelFileError if it is missing, cut off or damaged."""
    if not path.is_file():
        raise ModelFileError(f"{path} does not exist: name a GGUF file, or a model of `appliance models list`")
    spec = build_gguf_spec(read_gguf_header(path.resolve()))
    return ModelCandidate(spec, spec.variants[0], path.resolve())


def read_folder_candidate(path: Path) -> ModelCandidate:
    """A folder of safetensors that need not be in the catalogue. Raises ModelFileError if it is not whole."""
    spec = read_folder_spec(path.resolve())
    return ModelCandidate(spec, spec.variants[0], path.resolve())


def list_candidates(
    requested: EngineModel, catalog: Catalog, store: ModelStore, *, has_gpus: bool
) -> tuple[ModelCandidate, ...]:
    """The variants of one model that may be planned for, best first.

    With GPUs those for vLLM come first, in the order of the catalogue; those for llama.cpp, which lie here already
    before others, stand in where no GPU has room. Without GPUs it is the other way round. Raises UnknownModel and
    ModelFileError.
    """
    own = _own_files(requested)
    if own is not None:
        return (own,)
    model = catalog.get_model(requested.name)
    variants: Sequence[Variant] = model.variants
    if requested.variant is not None:
        variants = (_named_variant(ModelCandidate(model, model.variants[0], Path()), requested.variant, store).variant,)
    if requested.engine is not None:
        variants = [variant for variant in variants if variant.engine == requested.engine]
        if not variants:
            named, engine = requested.variant or "no variant", requested.engine
            raise UnknownModel(f"model {model.name!r}: {named} is for {engine}; leave `engine` or `variant` out")
    first = "vllm" if has_gpus else "llamacpp"

    def preference(variant: Variant) -> tuple[bool, bool]:
        is_here = variant.engine == "llamacpp" and store.find(model.name, variant.name) is not None
        return variant.engine != first, not is_here

    return tuple(
        ModelCandidate(
            model, variant, store.locate(model.name, variant.name, is_folder=variant.is_folder), overrides=requested
        )
        for variant in sorted(variants, key=preference)
    )


def _own_files(requested: EngineModel) -> ModelCandidate | None:
    """What `requested` names by its path, under its file's name or the one it is given; None for a catalogue name."""
    named = requested.path or requested.name
    path = Path(named).expanduser()
    if named.endswith(".gguf"):
        found = read_gguf_candidate(path)
    elif requested.path is not None or (path / "config.json").is_file():
        found = read_folder_candidate(path)
    else:
        return None
    if requested.path is not None:
        found = replace(found, model=replace(found.model, name=requested.name))
    return replace(found, overrides=requested)


def select_candidate(engine: EngineSettings, catalog: Catalog, store: ModelStore) -> ModelCandidate:
    """What `engine` asks for, in the variant it names; else one that lies here already, else the model's first.

    Raises UnknownModel, or ModelFileError for a file. What does not lie here yet has a path that does not exist.
    """
    if engine.model.endswith(".gguf"):
        found = read_gguf_candidate(Path(engine.model).expanduser())
        return found if engine.variant is None else _named_variant(found, engine.variant, store)
    model = catalog.get_model(engine.model)
    variants = model.list_variants("llamacpp")
    if not variants:
        raise UnknownModel(f"model {model.name!r} has no variant for this node's CPU engine; choose another model")
    here = [variant for variant in variants if store.find(model.name, variant.name)]
    chosen = (here or variants)[0]
    found = ModelCandidate(model, chosen, store.locate(model.name, chosen.name))
    return found if engine.variant is None else _named_variant(found, engine.variant, store)


def _named_variant(found: ModelCandidate, name: str, store: ModelStore) -> ModelCandidate:
    """The model of `found` in the variant the operator named: as published, or as derived on this machine."""
    model = found.model
    if name == found.variant.name:
        return found
    if any(variant.name == name for variant in model.variants):
        return ModelCandidate(model, model.get_variant(name), store.locate(model.name, name))
    stored = store.find(model.name, name)
    if stored is not None and stored.derived_from is not None:
        return _derived(model, stored)
    known = ", ".join(variant.name for variant in model.variants)
    raise UnknownModel(
        f"model {model.name!r} has no variant {name!r}; it has {known}. "
        f"`appliance calibrate {model.name} --variants {name}` derives it where llama.cpp can"
    )


def select_measured_variants(
    source: ModelCandidate, calibration: Calibration, engine: EngineSettings, store: ModelStore
) -> tuple[ModelCandidate, ...]:
    """What to plan for, best first, by what was measured of `source`. The source comes last: it always may be served.

    With a variant that the operator named nothing but the thread count is chosen.
    """
    here = (
        {}
        if engine.variant is not None
        else {one.variant: one for one in list_derived_variants(source, calibration, store)}
    )
    choice = choose_variant(
        calibration.measurement,
        engine.workload,
        engine.tolerance,
        threads=engine.threads,
        available={source.variant.name, *here},
    )
    if choice is None:
        return (source,)
    fallback = replace(source, threads=choice.threads)
    if choice.variant == source.variant.name:
        return (replace(fallback, reason=choice.reason),)
    best = replace(_derived(source.model, here[choice.variant]), threads=choice.threads, reason=choice.reason)
    return (best, fallback)


def list_derived_variants(source: ModelCandidate, calibration: Calibration, store: ModelStore) -> Iterator[StoredModel]:
    """The measured variants whose files lie here, unchanged and made from this very source."""
    for variant in calibration.measurement.variants:
        stored = store.find(source.model.name, variant.name)
        if stored is not None and stored.unchanged and stored.derived_from == calibration.key.file:
            yield stored


def _derived(model: ModelSpec, stored: StoredModel) -> ModelCandidate:
    variant = Variant(
        name=stored.variant,
        engine="llamacpp",
        format="gguf",
        quantisation=stored.variant.upper(),
        size_bytes=stored.size_bytes,
        sources=(FileSource(kind="file", path=str(stored.path)),),
        sha256=stored.sha256,
    )
    return ModelCandidate(model, variant, stored.path)
