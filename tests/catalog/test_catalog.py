"""The catalogue as shipped, and what is refused in it."""

import shutil
from pathlib import Path

import pytest

from appliance import catalog
from appliance.catalog import DevicePrior, HubSource, ModelSpec, find_data_folder, load_catalog, load_device, load_model
from appliance.errors import ConfigError, UnknownModel

EMBEDDED = find_data_folder("model_configs") / "smollm2-135m-instruct.toml"


def changed(tmp_path: Path, old: str, new: str, name: str = EMBEDDED.name) -> Path:
    """The embedded model's file with one thing changed."""
    text = EMBEDDED.read_text("utf-8")
    assert old in text
    path = tmp_path / name
    path.write_text(text.replace(old, new, 1), "utf-8")
    return path


def test_everything_shipped_loads_and_exactly_one_model_is_embedded() -> None:
    shipped = load_catalog()
    assert shipped.embedded.name == "smollm2-135m-instruct"
    assert len(shipped.models) == len(list(find_data_folder("model_configs").glob("*.toml")))
    assert len(shipped.devices) == len(list(find_data_folder("hardware").glob("*.toml")))


@pytest.mark.parametrize("model", load_catalog().models, ids=lambda model: model.name)
def test_a_shipped_models_weights_have_the_size_that_its_parameters_and_quantisation_imply(model: ModelSpec) -> None:
    # Bits a weight, with room for what is kept finer: embeddings, and an output matrix stored twice.
    bits = {
        "Q4_1": (5.0, 6.2),
        "Q4_K_M": (4.5, 8.2),
        "Q8_0": (8.4, 8.8),
        "BF16": (16.0, 16.6),
        "FP8": (8.0, 10.2),
        "AWQ": (4.1, 7.9),
        "GPTQ": (4.1, 6.0),
        "MXFP4": (4.2, 5.3),
        "INT8": (8.0, 8.4),  # of an encoder, with its tokenizer
        "F16": (16.0, 18.0),  # of static vectors, with their tokenizer
    }
    for variant in model.variants:
        least, most = bits[variant.quantisation]
        assert least <= variant.size_bytes * 8 / model.parameters <= most, variant.name


@pytest.mark.parametrize("model", load_catalog().models, ids=lambda model: model.name)
def test_every_shipped_gguf_can_be_proven(model: ModelSpec) -> None:
    for variant in model.variants:
        from_hub_alone = all(isinstance(source, HubSource) for source in variant.sources)
        assert variant.is_folder or variant.sha256 is not None or from_hub_alone, "a hub records its files' checksums"


def test_kv_bytes_are_two_numbers_per_head_dimension_layer_and_token() -> None:
    embedded = load_catalog().embedded
    assert embedded.kv_bytes(1) == 30 * 2 * 3 * 64 * 2
    assert embedded.kv_bytes(8192) == 8192 * embedded.kv_bytes(1)
    assert embedded.kv_bytes(1, element_bytes=1.0625) == int(30 * 2 * 3 * 64 * 1.0625)


def test_a_sliding_layer_remembers_no_more_than_its_window(tmp_path: Path) -> None:
    path = changed(tmp_path, "layers = 30", "layers = 30\nsliding_layers = 20\nsliding_window_tokens = 512")
    spec = load_model(path)
    a_layer = spec.kv_elements_per_token_per_layer * 2
    assert spec.kv_bytes(100) == 30 * 100 * a_layer
    assert spec.kv_bytes(4096) == (10 * 4096 + 20 * 512) * a_layer


def test_a_hybrid_model_keeps_a_fixed_state_beside_the_tokens_of_its_full_layers() -> None:
    spec = load_catalog().get_model("qwen3.5-27b")
    a_token = 16 * 2 * 4 * 256 * 2
    assert spec.full_layers == 16
    assert spec.kv_bytes(10) == 10 * a_token + spec.state_bytes
    assert spec.state_bytes == 48 * (48 * 128 * 128 * 4 + (2 * 16 * 128 + 48 * 128) * 3 * 2)
    assert spec.kv_bytes(10, tensor_parallel=2) == 10 * a_token // 2 + spec.state_bytes // 2


def test_latent_attention_is_not_split_between_devices_and_heads_are() -> None:
    latent, grouped = load_catalog().get_model("glm-4.7-flash"), load_catalog().get_model("qwen3-8b")
    assert latent.kv_bytes(1000) == latent.kv_bytes(1000, tensor_parallel=4) == 1000 * 47 * 576 * 2
    assert grouped.kv_bytes(1000, tensor_parallel=4) == grouped.kv_bytes(1000) // 4
    assert grouped.kv_bytes(1000, tensor_parallel=16) == grouped.kv_bytes(1000, tensor_parallel=8), "a head is whole"


def test_layers_that_keep_everything_may_have_other_heads_than_sliding_ones() -> None:
    spec = load_catalog().get_model("gemma-4-26b-a4b-it")
    assert spec.kv_bytes(8192) == (5 * 8192 * 2 * 2 * 512 + 25 * 1024 * 2 * 8 * 256) * 2
    assert spec.kv_bytes(8192, in_flight_tokens=2048) == (5 * 8192 * 2 * 2 * 512 + 25 * 3072 * 2 * 8 * 256) * 2


def test_the_catalogue_reaches_from_a_hundred_million_to_a_hundred_billion_parameters() -> None:
    models = load_catalog().models
    assert min(model.parameters for model in models) < 150_000_000
    assert max(model.parameters for model in models) > 100_000_000_000
    for ability in ("chat", "vision", "embeddings", "decisions", "tools", "reasoning"):
        assert any(ability in model.abilities for model in models), ability


def test_a_model_that_fits_no_rule_of_hybrids_is_refused(tmp_path: Path) -> None:
    for given, field in (
        ("linear_layers = 3", "linear_layers"),
        ("linear_layers = 31\nstate_bytes = 8", "linear_layers"),
    ):
        path = changed(tmp_path, "layers = 30", f"layers = 30\n{given}")
        with pytest.raises(ConfigError) as caught:
            load_model(path)
        assert caught.value.field == field


def test_an_unknown_model_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(UnknownModel, match=r"qwen3-4b") as caught:
        load_catalog().get_model("qwen3-4")
    assert caught.value.param == "model"


def test_an_unknown_variant_is_answered_with_those_there_are() -> None:
    with pytest.raises(UnknownModel, match="q4_k_m, bf16, fp8, awq"):
        load_catalog().get_model("qwen3-4b").get_variant("q2")
    assert load_catalog().get_model("qwen3-4b").get_variant("bf16").engine == "vllm"


def test_variants_are_found_by_engine() -> None:
    model = load_catalog().get_model("qwen3-8b")
    assert [variant.name for variant in model.list_variants("vllm")] == ["bf16", "fp8", "awq"]
    assert [variant.name for variant in model.list_variants("llamacpp")] == ["q4_k_m"]


@pytest.mark.parametrize(
    ("old", "new", "field", "line_holds"),
    [
        ("heads = 9", 'heads = "9"', "heads", "heads ="),
        ("heads = 9", "heads = 9.5", "heads", "heads ="),
        ("embedded = true", "embeded = true", "embeded", "embeded"),
        ("kv_heads = 3", "kv_heads = 4", "kv_heads", "kv_heads"),
        ("layers = 30", "layers = 0", "layers", "layers"),
        ('"labels"', '"singing"', "abilities[2]", "abilities"),
        ('engine = "llamacpp"', 'engine = "vllm"', "variants[0].format", "format"),
        ('kind = "pypi"', 'kind = "ftp"', "variants[0].sources[0]", "[[variants.sources]]"),
        ("size_bytes = 98_362_432", "", "variants[0].size_bytes", "[[variants]]"),
        ("layers = 30", "layers = 30\nsliding_layers = 3", "sliding_layers", "sliding_layers"),
        ('wheel_sha256 = "bcc8', 'wheel_sha256 = "xyz', "variants[0].sources[0].parts[0].wheel_sha256", "wheel_sha256"),
        ('name = "smollm2-135m-instruct"', 'name = "other"', "name", "name ="),
    ],
)
def test_a_mistake_in_a_model_file_is_named_with_its_file_line_and_field(
    tmp_path: Path, old: str, new: str, field: str, line_holds: str
) -> None:
    path = changed(tmp_path, old, new)
    with pytest.raises(ConfigError) as caught:
        load_model(path)
    error = caught.value
    assert error.file == str(path)
    assert error.field == field
    assert error.line is not None
    assert line_holds in path.read_text("utf-8").splitlines()[error.line - 1]
    assert str(path) in str(error)


def test_a_file_that_is_not_toml_is_named_with_its_line(tmp_path: Path) -> None:
    path = changed(tmp_path, "layers = 30", "layers = = 30")
    with pytest.raises(ConfigError) as caught:
        load_model(path)
    assert caught.value.line == path.read_text("utf-8").splitlines().index("layers = = 30") + 1


def test_a_file_that_cannot_be_read_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_model(tmp_path / "missing.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_model(tmp_path / "binary.toml")


def test_a_checksumless_address_is_refused(tmp_path: Path) -> None:
    path = changed(tmp_path, 'kind = "pypi"', 'kind = "url"\nurl = "https://models.example/a.gguf"')
    text = path.read_text("utf-8")
    path.write_text(text[: text.index("[[variants.sources.parts]]")], "utf-8")
    with pytest.raises(ConfigError, match="sha256"):
        load_model(path)


def test_an_operators_own_model_joins_the_catalogue_and_may_not_take_a_name_twice(tmp_path: Path) -> None:
    path = changed(tmp_path, 'name = "smollm2-135m-instruct"', 'name = "mine"', "mine.toml")
    path.write_text(path.read_text("utf-8").replace("embedded = true", ""), "utf-8")
    assert load_catalog([tmp_path]).get_model("mine").layers == 30
    shutil.copy(EMBEDDED, tmp_path)
    with pytest.raises(ConfigError, match="two files"):
        load_catalog([tmp_path])


def test_a_second_embedded_model_is_refused(tmp_path: Path) -> None:
    changed(tmp_path, 'name = "smollm2-135m-instruct"', 'name = "mine"', "mine.toml")
    with pytest.raises(ConfigError, match="mine"):
        load_catalog([tmp_path])


def test_the_data_is_found_inside_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "site-packages" / "appliance"
    (installed / "_data" / "hardware").mkdir(parents=True)
    monkeypatch.setattr(catalog, "__file__", str(installed / "catalog" / "__init__.py"))
    assert find_data_folder("hardware") == (installed / "_data" / "hardware").resolve()
    with pytest.raises(ConfigError, match="install again"):
        find_data_folder("model_configs")


def test_a_cpu_gets_the_most_demanding_prior_that_it_meets() -> None:
    shipped = load_catalog()
    old = frozenset({"sse4_2"})
    middle = frozenset({"avx2", "fma", "f16c", "avx512f"})
    new = middle | {"avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"}
    found = [shipped.find_cpu_prior(flags) for flags in (old, middle, new)]
    assert [device.name if device else None for device in found] == [None, "cpu-avx2", "cpu-avx512-bf16"]


@pytest.mark.parametrize("device", load_catalog().devices, ids=lambda device: device.name)
def test_a_device_can_be_planned_for_without_being_at_hand(device: DevicePrior) -> None:
    assert device.memory_bytes is not None
    if device.kind == "gpu":
        assert device.compute_capability and device.power_watts and device.peak_operations_per_second
        assert ("FP8" in device.peak_operations_per_second) == (float(device.compute_capability) >= 8.9)
        assert ("FP4" in device.peak_operations_per_second) == (float(device.compute_capability) >= 10)
    else:
        assert device.cores and device.flags and device.prefill_operations_per_second


def test_a_device_is_found_by_its_name_with_or_without_its_kind() -> None:
    shipped = load_catalog()
    assert shipped.get_device("h200") == shipped.get_device("gpu-h200")
    with pytest.raises(ConfigError, match="gpu-h100"):
        shipped.get_device("h100")


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        ("NVIDIA H200", "gpu-h200"),
        ("NVIDIA H200 NVL", "gpu-h200"),
        ("NVIDIA L4", "gpu-l4"),
        ("NVIDIA L40S", "gpu-l40s"),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3", "gpu-h100-sxm"),
        ("NVIDIA H100 PCIe", "gpu-h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "gpu-a100-80gb-sxm"),
        ("NVIDIA A100 80GB PCIe", "gpu-a100-80gb-pcie"),
        ("NVIDIA A100-PCIE-40GB", "gpu-a100-40gb"),
        ("NVIDIA B200", "gpu-b200"),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 5090", "gpu-rtx-5090"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "gpu-rtx-pro-6000"),
        ("NVIDIA GB10", "gpu-dgx-spark"),
        ("Orin (nvgpu)", "gpu-jetson-agx-orin"),
        ("NVIDIA GeForce RTX 4090", "gpu-rtx-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "gpu-rtx-4090"),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_is_known_by_the_words_of_its_name(reported: str, expected: str | None) -> None:
    device = load_catalog().find_gpu_prior(reported)
    assert (device.name if device else None) == expected


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ('product_names = ["NVIDIA L4"]', "", "kind"),
        ("memory_bytes = 24_152_899_584", "", "kind"),
        ('name = "gpu-l4"', 'name = "gpu-l5"', "name"),
        ('kind = "gpu"', 'kind = "cpu"', "product_names"),
        ('basis = "vendor"', 'basis = "rumour"', "basis"),
    ],
)
def test_a_contradictory_device_file_is_refused(tmp_path: Path, old: str, new: str, field: str) -> None:
    path = tmp_path / "gpu-l4.toml"
    path.write_text((find_data_folder("hardware") / "gpu-l4.toml").read_text("utf-8").replace(old, new, 1), "utf-8")
    with pytest.raises(ConfigError) as caught:
        load_device(path)
    assert caught.value.field == field
