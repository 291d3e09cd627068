"""appliance models, plan and probe, as they are typed."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from appliance.cli import app
from tests.node.gguf_bytes import gguf_bytes

RUN = CliRunner(env={"COLUMNS": "250"})

OWN = """
name = "own"
title = "Own"
family = "own"
publisher = "me"
licence = "MIT"
parameters = 1000
context_tokens = 4096
layers = 2
embedding = 64
heads = 4
kv_heads = 2
head_dimension = 16
vocabulary_tokens = 512
abilities = ["chat"]
notes = "Mine."

[[variants]]
name = "f16"
engine = "llamacpp"
format = "gguf"
quantisation = "F16"
size_bytes = {size}

[[variants.sources]]
kind = "file"
path = "{gguf}"

[[variants]]
name = "bf16"
engine = "vllm"
format = "safetensors"
quantisation = "BF16"
size_bytes = 1000

[[variants.sources]]
kind = "file"
path = "{folder}"
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A data directory with a model of one's own in its catalogue, and its files elsewhere."""
    gguf, folder, home = tmp_path / "own.gguf", tmp_path / "weights", tmp_path / "home"
    gguf.write_bytes(gguf_bytes())
    folder.mkdir()
    head = json.dumps({"a": {"dtype": "BF16", "shape": [500], "data_offsets": [0, 1000]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(1000))
    (folder / "config.json").write_text("{}")
    (home / "model_configs").mkdir(parents=True)
    text = OWN.format(size=gguf.stat().st_size, gguf=gguf, folder=folder)
    (home / "model_configs" / "own.toml").write_text(text)
    return home


def run(home: Path, *words: str) -> Result:
    return RUN.invoke(app, [*words, "--data-dir", str(home)])


def rows(home: Path) -> dict[tuple[str, str], dict[str, Any]]:
    done = run(home, "models", "list", "--json")
    assert done.exit_code == 0, done.stderr
    return {(row["model"], row["variant"]): row for row in json.loads(done.stdout)}


@pytest.mark.parametrize("variant", ["f16", "bf16"])
def test_a_model_of_ones_own_is_pulled_verified_and_removed(home: Path, variant: str) -> None:
    assert rows(home)["own", variant]["here"] is False
    pulled = run(home, "models", "pull", "own", "--variant", variant)
    assert pulled.exit_code == 0, pulled.stderr
    path = Path(pulled.stdout.strip().splitlines()[-1])
    assert path.exists() and path.is_relative_to(home / "models" / "own")
    assert rows(home)["own", variant]["here"] is True
    assert "whole, sha256" in run(home, "models", "verify", "own", "--variant", variant).stdout
    assert "freed" in run(home, "models", "remove", "own", "--variant", variant).stdout
    assert not path.exists()
    again = run(home, "models", "remove", "own", "--variant", variant)
    assert again.exit_code == 1 and "is not here" in again.stderr


def test_what_is_known_of_a_model_is_shown_with_its_dimensions(home: Path) -> None:
    shown = json.loads(run(home, "models", "show", "qwen3.5-27b").stdout)
    assert (shown["linear_layers"], shown["architecture"]) == (48, "Qwen3_5ForConditionalGeneration")
    assert [variant["variant"] for variant in shown["variants"]] == ["bf16", "fp8", "gptq"]


def test_an_unknown_model_and_a_broken_catalogue_are_told(home: Path) -> None:
    unknown = run(home, "models", "pull", "qwen3-4")
    assert unknown.exit_code == 1 and "qwen3-4b" in unknown.stderr
    (home / "model_configs" / "own.toml").write_text("name = 3")
    broken = run(home, "models", "list")
    assert broken.exit_code == 1 and "own.toml" in broken.stderr


def test_a_plan_for_a_machine_that_is_not_at_hand(home: Path) -> None:
    words = ("plan", "--for", "h200", "--gpus", "2", "--model", "gpt-oss-120b", "--model", "own", "--json")
    done = run(home, *words)
    assert done.exit_code == 0, done.stderr
    found = {(row["model"], row["variant"]): row for row in json.loads(done.stdout)["candidates"]}
    place = found["gpt-oss-120b", "mxfp4"]["placement"]
    assert place["engine"] == "vllm" and place["gpu"]["tensor_parallel"] == 1
    assert place["settings"]["--reasoning-parser"] == "openai_gptoss"
    assert found["own", "bf16"]["placement"]["gpu"]["devices"] != place["gpu"]["devices"]
    assert found["own", "f16"]["refusal"] == "own is already placed as bf16"


def test_a_device_is_named_by_its_file_too_and_an_unknown_one_is_told(home: Path) -> None:
    by_file = run(home, "plan", "qwen3-8b", "--for", "hardware/gpu-l4.toml")
    assert by_file.exit_code == 0 and "1 GPU" in by_file.stdout
    assert by_file.stdout == run(home, "plan", "qwen3-8b", "--for", "l4").stdout
    unknown = run(home, "plan", "--for", "h300")
    assert unknown.exit_code == 1 and "gpu-h" in unknown.stderr


def test_each_variant_is_judged_by_itself_and_refusals_tell_bytes(home: Path) -> None:
    done = run(home, "plan", "llama-3.3-70b-instruct", "--for", "h100-sxm", "--json")
    found = {row["variant"]: row for row in json.loads(done.stdout)["candidates"]}
    assert found["bf16"]["placement"] is None and "usable" in found["bf16"]["refusal"]
    assert found["fp8"]["placement"] and found["awq"]["placement"]


def test_a_processor_is_planned_for_with_cores_and_memory_of_ones_choice(home: Path) -> None:
    words = ("plan", "qwen3-8b", "--for", "cpu-amx", "--cores", "3", "--memory-gib", "12", "--json")
    (row, *_) = json.loads(run(home, *words).stdout)["candidates"]
    assert row["variant"] == "q4_k_m" and row["placement"]["shape"]["threads"] == 3
    assert row["placement"]["memory_bytes"] < 12 << 30


def test_this_machine_can_be_probed_and_planned_for(home: Path) -> None:
    probed = RUN.invoke(app, ["probe"])
    assert probed.exit_code == 0 and "usable cores" in probed.stdout
    table = json.loads(RUN.invoke(app, ["probe", "--json"]).stdout)
    assert table["cpu"]["siblings"] and table["gpus"]["state"] in ("absent", "running", "gone")
    assert run(home, "plan", "own").exit_code == 0
