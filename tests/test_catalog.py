"""The catalogue as shipped, and what is refused in it."""

import shutil
from pathlib import Path

import pytest

from appliance import catalog
from appliance.catalog import ModelSpec, data_folder, load_catalog, load_device, load_model
from appliance.errors import ConfigError, UnknownModel

EMBEDDED = data_folder("model_configs") / "smollm2-135m-instruct.toml"


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
    assert len(shipped.models) == len(list(data_folder("model_configs").glob("*.toml")))
    assert len(shipped.devices) == len(list(data_folder("hardware").glob("*.toml")))


@pytest.mark.parametrize("model", load_catalog().models, ids=lambda model: model.name)
def test_a_shipped_models_weights_have_the_size_that_its_parameters_and_quantisation_imply(model: ModelSpec) -> None:
    # Bits a weight, with room for what is kept finer: embeddings, and an output matrix stored twice.
    bits = {"Q4_1": (5.0, 6.2), "Q4_K_M": (4.5, 8.2), "Q8_0": (8.4, 8.8), "BF16": (16.0, 16.1)}
    for variant in model.variants:
        least, most = bits[variant.quantisation]
        assert least <= variant.size_bytes * 8 / model.parameters <= most, variant.name


@pytest.mark.parametrize("model", load_catalog().models, ids=lambda model: model.name)
def test_every_shipped_gguf_can_be_proven(model: ModelSpec) -> None:
    for variant in model.variants:
        assert variant.is_folder or variant.sha256 is not None


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


def test_an_unknown_model_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(UnknownModel, match=r"qwen3-4b") as caught:
        load_catalog().model("qwen3-4")
    assert caught.value.param == "model"


def test_an_unknown_variant_is_answered_with_those_there_are() -> None:
    with pytest.raises(UnknownModel, match="q4_k_m, bf16"):
        load_catalog().model("qwen3-4b").variant("q2")
    assert load_catalog().model("qwen3-4b").variant("bf16").engine == "vllm"


def test_variants_are_found_by_engine() -> None:
    model = load_catalog().model("qwen3-8b")
    assert [variant.name for variant in model.for_engine("vllm")] == ["bf16"]
    assert [variant.name for variant in model.for_engine("llamacpp")] == ["q4_k_m"]


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
    assert load_catalog([tmp_path]).model("mine").layers == 30
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
    assert data_folder("hardware") == (installed / "_data" / "hardware").resolve()
    with pytest.raises(ConfigError, match="install again"):
        data_folder("model_configs")


def test_a_cpu_gets_the_most_demanding_prior_that_it_meets() -> None:
    shipped = load_catalog()
    old = frozenset({"sse4_2"})
    middle = frozenset({"avx2", "fma", "f16c", "avx512f"})
    new = middle | {"avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"}
    found = [shipped.cpu_prior(flags) for flags in (old, middle, new)]
    assert [device.name if device else None for device in found] == [None, "cpu-avx2", "cpu-avx512-bf16"]


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        ("NVIDIA H200", "gpu-h200"),
        ("NVIDIA H200 NVL", "gpu-h200"),
        ("NVIDIA L4", "gpu-l4"),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090", "gpu-rtx-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "gpu-rtx-4090"),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_is_known_by_the_words_of_its_name(reported: str, expected: str | None) -> None:
    device = load_catalog().gpu_prior(reported)
    assert (device.name if device else None) == expected


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ('product_names = ["NVIDIA L4"]', "", "kind"),
        ("memory_bytes = 24_000_000_000", "", "kind"),
        ('name = "gpu-l4"', 'name = "gpu-l5"', "name"),
        ('kind = "gpu"', 'kind = "cpu"', "product_names"),
        ('basis = "vendor"', 'basis = "rumour"', "basis"),
    ],
)
def test_a_contradictory_device_file_is_refused(tmp_path: Path, old: str, new: str, field: str) -> None:
    path = tmp_path / "gpu-l4.toml"
    path.write_text((data_folder("hardware") / "gpu-l4.toml").read_text("utf-8").replace(old, new, 1), "utf-8")
    with pytest.raises(ConfigError) as caught:
        load_device(path)
    assert caught.value.field == field
