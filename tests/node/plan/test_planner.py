"""What is placed on which machine, and what is refused, in bytes."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.catalog import Catalog, DevicePrior, ModelSpec, UrlSource, Variant
from appliance.config import EngineSettings
from appliance.node.hardware.probe import Hardware, probe_hardware
from appliance.node.plan.cpu_fit import compute_usable_bytes
from appliance.node.plan.models import ModelCandidate, Plan
from appliance.node.plan.planner import plan_placements
from appliance.node.plan.recommendation import recommend_model
from tests.node.machines import GIB, FakeNvml, meminfo, topology, write_tree

SOURCE = UrlSource(kind="url", url="https://models.invalid/file.gguf", sha256="0" * 64)


def variant(name: str = "q4_1", size_bytes: int = 98_362_432) -> Variant:
    return Variant(
        name=name,
        engine="llamacpp",
        format="gguf",
        quantisation=name.upper(),
        size_bytes=size_bytes,
        sources=(SOURCE,),
    )


SMALL = ModelSpec(
    name="small",
    title="Small",
    family="small",
    publisher="nobody",
    licence="Apache-2.0",
    parameters=134_515_008,
    context_tokens=8192,
    layers=30,
    embedding=576,
    heads=9,
    kv_heads=3,
    head_dimension=64,
    vocabulary_tokens=49_152,
    abilities=("chat", "completions"),
    notes="",
    variants=(variant(),),
)
LARGE = replace(
    SMALL,
    name="large",
    parameters=8_000_000_000,
    context_tokens=131_072,
    layers=36,
    embedding=4096,
    heads=32,
    kv_heads=8,
    head_dimension=128,
    vocabulary_tokens=151_936,
    variants=(variant("q4_k_m", 5_000_000_000),),
)


@pytest.fixture
def machine(tmp_path: Path) -> Hardware:
    return _machine(tmp_path, cores=2, total=24 * GIB, available=20 * GIB)


def _machine(root: Path, *, cores: int, total: int, available: int) -> Hardware:
    hardware = probe_hardware(write_tree(root, topology(cores) | meminfo(total, available)), FakeNvml())
    return replace(hardware, cpu=replace(hardware.cpu, usable_cores=cores, usable_reason=f"{cores} physical cores"))


def _with_ram(hardware: Hardware, usable: int) -> Hardware:
    return replace(hardware, ram=replace(hardware.ram, usable_bytes=usable))


def _plan(hardware: Hardware, *models: ModelSpec, config: EngineSettings | None = None) -> Plan:
    wanted = [ModelCandidate(model, model.variants[0], Path(f"/models/{model.name}.gguf")) for model in models]
    return plan_placements(hardware, wanted, config or EngineSettings())


def test_a_model_that_fits_is_placed_with_reasons(machine: Hardware) -> None:
    (placement,) = _plan(machine, SMALL).placements
    assert (placement.target, placement.engine, placement.variant) == ("onsite/small", "llamacpp", "q4_1")
    assert placement.abilities == {"chat", "completions", "labels", "json_schema", "logprobs"}
    shape = placement.shape
    assert (shape.threads, shape.sequences, shape.context_tokens) == (2, 32, 8192 + 31 * 1024)
    assert shape.sequence_context_tokens == 8192
    assert placement.memory.kv_bytes == shape.context_tokens * 2 * 30 * 3 * 64 * 2
    assert placement.reasons[0].startswith(f"needs {placement.memory.total_bytes:,} bytes (weights 98,362,432 + KV ")


def test_the_reserve_is_never_given_away(machine: Hardware) -> None:
    usable, reason = compute_usable_bytes(machine)
    assert usable == 20 * GIB - 24 * GIB // 20
    assert f"{24 * GIB // 20:,} stay for the node itself" in reason
    assert compute_usable_bytes(_with_ram(machine, 100))[0] == 0


def test_a_model_that_does_not_fit_is_refused_in_bytes(machine: Hardware) -> None:
    result = _plan(_with_ram(machine, 3 * GIB), LARGE)
    (refusal,) = result.refusals
    assert result.placements == ()
    figures = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]{6,}", refusal.reason)]
    needed, weights, *_, usable = figures
    assert (weights, usable) == (5_000_000_000, result.usable_bytes)
    assert needed > usable
    assert refusal.reason.endswith("choose a smaller model or variant, or free memory")


def test_less_memory_means_less_context_and_then_fewer_sequences(machine: Hardware) -> None:
    contexts, sequences = [], []
    for usable in (20 * GIB, 1_900_000_000, 1_800_000_000, 1_700_000_000):
        (placement,) = _plan(_with_ram(machine, usable), SMALL).placements
        contexts.append(placement.shape.context_tokens)
        sequences.append(placement.shape.sequences)
        assert placement.memory.total_bytes <= usable
    assert contexts == sorted(contexts, reverse=True) and len(set(contexts)) == 4
    assert sequences[0] == 32 > sequences[-1] >= 4


def test_a_small_model_leaves_half_of_the_memory_alone(machine: Hardware) -> None:
    result = _plan(machine, replace(LARGE, variants=(variant("q4_k_m", 1 << 30),)))
    (placement,) = result.placements
    left = result.usable_bytes - placement.memory.weights_bytes
    assert placement.memory.kv_bytes <= left / 2


def test_a_long_context_is_not_given_unasked(machine: Hardware) -> None:
    hardware = _with_ram(machine, 400 * GIB)
    (placement,) = _plan(hardware, LARGE).placements
    assert placement.shape.context_tokens == 32_768 + 31 * 1024
    (asked,) = _plan(hardware, LARGE, config=EngineSettings(context_tokens=131_072)).placements
    assert asked.shape.sequence_context_tokens == 131_072


def test_what_the_operator_sets_is_kept(machine: Hardware) -> None:
    config = EngineSettings(threads=1, context_tokens=4096, sequences=3, max_queued_requests=7)
    (placement,) = _plan(machine, SMALL, config=config).placements
    shape = placement.shape
    assert (shape.threads, shape.context_tokens, shape.sequences, shape.max_queued_requests) == (1, 4096, 3, 7)
    assert [reason for reason in placement.reasons if "as configured" in reason] == list(placement.reasons[1:])


def test_a_configured_context_that_does_not_fit_is_refused_with_the_largest_that_does(machine: Hardware) -> None:
    hardware = _with_ram(machine, 2_500_000_000)
    (refusal,) = _plan(hardware, SMALL, config=EngineSettings(context_tokens=1_000_000)).refusals
    found = re.search(r"set engine.context_tokens to ([\d,]+) or less", refusal.reason)
    assert found
    most = int(found[1].replace(",", ""))
    assert _plan(hardware, SMALL, config=EngineSettings(context_tokens=most)).placements
    assert _plan(hardware, SMALL, config=EngineSettings(context_tokens=most + 256)).refusals


def test_models_share_the_memory_in_the_order_they_are_wanted(machine: Hardware) -> None:
    hardware = _with_ram(machine, 8_600_000_000)
    first = _plan(hardware, SMALL, LARGE)
    assert [placement.model for placement in first.placements] == ["small", "large"]
    second = _plan(hardware, LARGE, replace(LARGE, name="other"))
    assert [placement.model for placement in second.placements] == ["large"]
    assert [refusal.model for refusal in second.refusals] == ["other"]


def test_of_several_variants_the_first_that_fits_is_placed(machine: Hardware) -> None:
    big, little = variant("bf16", 90 * GIB), variant("q4_1")
    model = replace(SMALL, variants=(big, little, variant("q8_0")))
    result = plan_placements(
        machine, [ModelCandidate(model, each, Path("x")) for each in model.variants], EngineSettings()
    )
    assert [placement.variant for placement in result.placements] == ["q4_1"]
    assert [refusal.variant for refusal in result.refusals] == ["bf16", "q8_0"]
    assert result.refusals[1].reason == "small is already placed as q4_1"


def test_a_model_that_is_for_something_else_than_its_engine_does_is_refused(machine: Hardware) -> None:
    encoder = replace(SMALL, variants=(replace(variant("int8"), engine="encoder", format="onnx"),))
    embedder = replace(SMALL, name="embedder", abilities=("embeddings",))
    reasons = [refusal.reason for refusal in _plan(machine, encoder, embedder).refusals]
    assert reasons[0] == "encoder does nothing of what small is for (chat, completions)"
    assert reasons[1] == "llamacpp does nothing of what embedder is for (embeddings)"


def test_a_base_model_without_a_template_cannot_chat(machine: Hardware) -> None:
    (placement,) = _plan(machine, replace(SMALL, abilities=("completions",))).placements
    assert "chat" not in placement.abilities
    assert "labels" in placement.abilities


@pytest.mark.parametrize(("cores", "sequences"), [(1, 16), (2, 32), (4, 32), (64, 32)])
def test_sequences_follow_the_cores(tmp_path: Path, cores: int, sequences: int) -> None:
    hardware = _machine(tmp_path, cores=cores, total=64 * GIB, available=60 * GIB)
    (placement,) = _plan(hardware, SMALL).placements
    assert (placement.shape.threads, placement.shape.sequences) == (cores, sequences)


PRIOR = DevicePrior(
    name="cpu",
    title="CPU",
    kind="cpu",
    basis="measured",
    source="a test",
    memory_bandwidth_bytes_per_second=48_000_000_000,
    prefill_operations_per_second={"Q4_1": 100_000_000_000, "Q8_0": 900_000_000_000},
)


def test_the_best_candidate_is_the_largest_that_fits_and_is_quick_enough(machine: Hardware) -> None:
    middle = replace(SMALL, name="middle", parameters=2_000_000_000, variants=(variant("q4_1", 1 << 30),))
    found = recommend_model(machine, Catalog(models=(SMALL, middle, LARGE), devices=(PRIOR,)))
    assert found and found.model.name == "middle"
    assert found.decode_tokens_per_second == pytest.approx(48e9 / 2**30)
    assert found.prefill_tokens_per_second == pytest.approx(100e9 * 2 / 4e9)
    assert "cpu, measured" in found.basis and found.basis.endswith("not measured here")


def test_a_quantisation_that_nobody_measured_counts_as_the_slowest(machine: Hardware) -> None:
    unknown = replace(SMALL, variants=(variant("iq3_xs"),))
    found = recommend_model(machine, Catalog(models=(unknown,), devices=(PRIOR,)))
    assert found and found.prefill_tokens_per_second == pytest.approx(100e9 * 2 / (2 * SMALL.parameters))


def test_without_a_prior_the_estimate_says_that_it_is_assumed(machine: Hardware) -> None:
    found = recommend_model(machine, Catalog(models=(SMALL,), devices=()))
    assert found and "(assumed)" in found.basis


def test_there_may_be_no_candidate(machine: Hardware) -> None:
    assert recommend_model(_with_ram(machine, GIB), Catalog(models=(SMALL, LARGE), devices=())) is None
    embedder = replace(SMALL, abilities=("embeddings",))
    assert recommend_model(machine, Catalog(models=(embedder,), devices=())) is None
