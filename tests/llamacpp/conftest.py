"""The embedded model, loaded once for all tests of the engine, and a variant in which batching changes nothing."""

import ctypes
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from appliance.llamacpp.binding import lib
from appliance.llamacpp.engine import LlamaEngine
from appliance.llamacpp.model import LlamaModel


# Models are closed with their module: half a gigabyte is not held, nor threads kept, while the rest of the suite runs.
@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> Iterator[LlamaModel]:
    """Small on purpose: 512 KV cells and 4 sequences, so that tests reach the limits quickly."""
    loaded = LlamaModel.load(smollm2_path, threads=1, context_tokens=512, sequences=4, batch_tokens=256)
    yield loaded
    loaded.close()


@pytest.fixture(scope="session")
def f32_path(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same weights in float32, made by llama.cpp's own quantiser."""
    path = tmp_path_factory.mktemp("f32") / "f32.gguf"
    params = lib.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.allow_requantize = 2, lib.LLAMA_FTYPE_ALL_F32, True
    assert lib.llama_model_quantize(str(smollm2_path).encode(), str(path).encode(), ctypes.byref(params)) == 0
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def f32_model(f32_path: Path) -> Iterator[LlamaModel]:
    loaded = LlamaModel.load(f32_path, threads=1, context_tokens=512, sequences=4, batch_tokens=256, attention="exact")
    yield loaded
    loaded.close()


@pytest.fixture
async def engine(model: LlamaModel) -> AsyncIterator[LlamaEngine]:
    started = LlamaEngine(model, calibrate=False)
    started.start()
    yield started
    await started.close(0)


@pytest.fixture
async def exact(f32_model: LlamaModel) -> AsyncIterator[LlamaEngine]:
    started = LlamaEngine(f32_model, calibrate=False)
    started.start()
    yield started
    await started.close(0)
