"""Which variants of what the operator named are planned for, and which models take turns."""

from dataclasses import replace
from pathlib import Path

import pytest

from appliance.catalog import Catalog, load_catalog
from appliance.config import EngineModel, EngineSettings
from appliance.errors import ModelFileError, UnknownModel
from appliance.node.models.candidates import list_candidates
from appliance.node.models.model_store import ModelStore
from appliance.node.plan.hypothetical_hardware import build_hypothetical_hardware
from appliance.node.plan.serving_plan import ServingPlan, build_serving_plan
from tests.node.gguf_bytes import gguf_bytes
from tests.node.models.test_hf_folder import PLAIN, folder

CATALOG = load_catalog()
BOTH = ("llamacpp", "vllm")


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "data")


def names(wish: EngineModel, store: ModelStore, has_gpus: bool, catalog: Catalog = CATALOG) -> list[str]:
    return [item.variant.name for item in list_candidates(wish, catalog, store, has_gpus=has_gpus)]


def put(store: ModelStore, model: str, variant: str) -> None:
    path = store.folder / model / f"{variant}.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gguf_bytes())


def put_folder(store: ModelStore, model: str, variant: str) -> None:
    path = store.folder / model / variant
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")


def lined(store: ModelStore, device: str, *wishes: EngineModel, engines: tuple[str, ...] = BOTH) -> ServingPlan:
    hardware = build_hypothetical_hardware(CATALOG.get_device(device))
    has_gpus = device != "avx512-vnni"
    groups = [list_candidates(wish, CATALOG, store, has_gpus=has_gpus) for wish in wishes]
    return build_serving_plan(hardware, groups, EngineSettings(), engines)  # type: ignore[arg-type]


def test_with_gpus_their_variants_come_first_and_without_them_last(store: ModelStore) -> None:
    wish = EngineModel(name="qwen3-4b")
    assert names(wish, store, True) == ["bf16", "fp8", "awq", "q4_k_m"]
    assert names(wish, store, False) == ["q4_k_m", "bf16", "fp8", "awq"]


def test_an_engine_or_a_variant_that_was_asked_for_is_the_only_one(store: ModelStore) -> None:
    assert names(EngineModel(name="qwen3-4b", engine="llamacpp"), store, True) == ["q4_k_m"]
    assert names(EngineModel(name="qwen3-4b", variant="awq"), store, True) == ["awq"]
    with pytest.raises(UnknownModel, match="awq is for llamacpp"):
        names(EngineModel(name="qwen3-4b", variant="awq", engine="llamacpp"), store, True)
    with pytest.raises(UnknownModel, match="has no variant 'int3'"):
        names(EngineModel(name="qwen3-4b", variant="int3"), store, True)
    with pytest.raises(UnknownModel, match="did you mean"):
        names(EngineModel(name="qwen3-4"), store, True)


def test_files_of_ones_own_are_named_by_path_and_may_get_a_name(store: ModelStore, tmp_path: Path) -> None:
    file = tmp_path / "Own-Model.gguf"
    file.write_bytes(gguf_bytes())
    (own,) = list_candidates(EngineModel(name=str(file)), CATALOG, store, has_gpus=True)
    assert (own.model.name, own.variant.engine, own.path) == ("own-model", "llamacpp", file.resolve())
    place = folder(tmp_path, PLAIN)
    (named,) = list_candidates(EngineModel(name="mine", path=str(place)), CATALOG, store, has_gpus=True)
    assert (named.model.name, named.variant.engine, named.path) == ("mine", "vllm", place.resolve())
    with pytest.raises(ModelFileError):
        list_candidates(EngineModel(name="mine", path=str(tmp_path / "missing")), CATALOG, store, has_gpus=True)


def test_what_is_to_be_pulled_has_the_path_it_will_have(store: ModelStore) -> None:
    paths = {
        item.variant.name: item.path.name
        for item in list_candidates(EngineModel(name="qwen3-4b"), CATALOG, store, has_gpus=True)
    }
    assert paths == {"bf16": "bf16", "fp8": "fp8", "awq": "awq", "q4_k_m": "q4_k_m.gguf"}


def test_models_that_fit_together_are_loaded_and_the_rest_takes_turns(store: ModelStore) -> None:
    wishes = [EngineModel(name=name) for name in ("gpt-oss-120b", "llama-3.3-70b-instruct", "smollm2-1.7b-instruct")]
    found = lined(store, "h200", *wishes)
    assert [(one.model, one.engine) for one in found.loaded.placements] == [
        ("gpt-oss-120b", "vllm"),
        ("llama-3.3-70b-instruct", "vllm"),
        ("smollm2-1.7b-instruct", "llamacpp"),
    ]
    small = lined(store, "h100-sxm", *wishes)
    assert [one.model for one in small.loaded.placements] == ["gpt-oss-120b", "smollm2-1.7b-instruct"]
    (on_demand,) = small.on_demand
    assert (on_demand.model, on_demand.variant) == ("llama-3.3-70b-instruct", "awq")
    assert [one.model for one in small.placements] == [
        "gpt-oss-120b",
        "smollm2-1.7b-instruct",
        "llama-3.3-70b-instruct",
    ]
    assert small.missing == ()
    (key,) = small.loaded.gpu_usable_bytes
    assert small.pools == {"ram": small.loaded.usable_bytes, key: small.loaded.gpu_usable_bytes[key]}
    for one in small.placements:
        assert one.memory.total_bytes <= small.pools["ram" if one.gpu is None else key]


def test_a_model_that_fits_nowhere_is_told(store: ModelStore) -> None:
    found = lined(store, "l4", EngineModel(name="qwen3-8b"), EngineModel(name="gpt-oss-120b"))
    assert [one.model for one in found.placements] == ["qwen3-8b"]
    (missing,) = found.missing
    assert missing.model == "gpt-oss-120b" and "usable" in missing.reason


def test_what_lies_here_is_served_before_what_would_have_to_be_pulled(store: ModelStore) -> None:
    wish = EngineModel(name="qwen3-8b")
    assert lined(store, "h200", wish).placements[0].variant == "bf16"
    put_folder(store, "qwen3-8b", "fp8")
    assert lined(store, "h200", wish).placements[0].variant == "fp8"
    put(store, "qwen3-8b", "q4_k_m")
    assert lined(store, "h200", wish).placements[0].engine == "vllm"


def test_a_larger_variant_that_lies_here_and_does_not_fit_makes_way_for_one_that_does(store: ModelStore) -> None:
    put_folder(store, "llama-3.3-70b-instruct", "bf16")
    found = lined(store, "h100-sxm", EngineModel(name="llama-3.3-70b-instruct"))
    assert [one.variant for one in found.placements] == ["awq"]


def test_without_vllm_its_variants_are_left_out_with_the_remedy(store: ModelStore) -> None:
    found = lined(store, "h200", EngineModel(name="qwen3-4b"), EngineModel(name="phi-4"), engines=("llamacpp",))
    assert [(one.model, one.variant) for one in found.placements] == [("qwen3-4b", "q4_k_m")]
    (missing,) = found.missing
    assert missing.model == "phi-4" and "appliance engines install vllm" in missing.reason


def test_wishes_of_one_model_do_not_touch_another(store: ModelStore) -> None:
    first = EngineModel(name="smollm2-1.7b-instruct", context_tokens=4096, sequences=2, quality=0.4)
    found = lined(store, "avx512-vnni", first, EngineModel(name="qwen3-0.6b"))
    one, other = found.placements
    assert (one.shape.context_tokens, one.shape.sequences, one.quality) == (4096, 2, 0.4)
    assert other.shape.context_tokens > 4096 and other.shape.sequences == 32 and other.quality is None


def test_several_models_are_configured_and_the_embedded_one_is_not_among_them_unless_it_is_named() -> None:
    rows = ({"name": "a"}, {"name": "b", "variant": "fp8"})
    several = EngineSettings.model_validate({"models": rows})
    assert [one.name for one in several.wanted_models] == ["a", "b"]
    assert [one.name for one in EngineSettings().wanted_models] == ["smollm2-135m-instruct"]
    both = EngineSettings.model_validate({"model": "c", "sequences": 3, "models": rows})
    assert [(one.name, one.sequences) for one in both.wanted_models] == [("c", 3), ("a", None), ("b", None)]
    with pytest.raises(ValueError, match="wanted twice"):
        EngineSettings.model_validate({"models": (*rows, {"name": "a"})})


def test_a_plan_for_a_catalogue_of_ones_own_needs_no_other(store: ModelStore) -> None:
    tiny = replace(CATALOG.get_model("qwen3-4b"), name="mine")
    assert names(EngineModel(name="mine"), store, True, Catalog(models=(tiny,), devices=()))[0] == "bf16"
