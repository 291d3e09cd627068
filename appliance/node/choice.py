"""From what the operator named to what is planned for: a catalogue name, or a GGUF of their own."""

from pathlib import Path

from appliance.catalog import Catalog
from appliance.config import Engine
from appliance.errors import ModelFileError, UnknownModel
from appliance.node.gguf import read_header, spec_of
from appliance.node.models import ModelStore
from appliance.node.planner import Wanted


def wanted_file(path: Path) -> Wanted:
    """A GGUF that need not be in the catalogue. Raises ModelFileError where it is missing, cut off or damaged."""
    if not path.is_file():
        raise ModelFileError(f"{path} does not exist: name a GGUF file, or a model of `appliance models list`")
    spec = spec_of(read_header(path.resolve()))
    return Wanted(spec, spec.variants[0], path.resolve())


def wanted(engine: Engine, catalog: Catalog, store: ModelStore) -> Wanted:
    """What `engine` asks for, in the variant it names; else one that lies here already, else the model's first.

    Raises UnknownModel, or ModelFileError for a file. What does not lie here yet has a path that does not exist.
    """
    if engine.model.endswith(".gguf"):
        return wanted_file(Path(engine.model).expanduser())
    model = catalog.model(engine.model)
    variants = model.for_engine("llamacpp")
    if not variants:
        raise UnknownModel(f"model {model.name!r} has no variant for this node's CPU engine; choose another model")
    if engine.variant is not None:
        variants = (model.variant(engine.variant),)
    here = [variant for variant in variants if store.find(model.name, variant.name)]
    chosen = (here or variants)[0]
    return Wanted(model, chosen, store.path_of(model.name, chosen.name))
