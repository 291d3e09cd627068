"""The embedded model's vocabulary and its engine, loaded once for the room's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.llamacpp.model import Model
from appliance.llamacpp.prompts import Prompts


@pytest.fixture(scope="session")
def served_model(smollm2_path: Path) -> Iterator[Model]:
    """Loaded with one thread: llama.cpp's threads spin, and tests share the machine."""
    model = Model.load(smollm2_path, threads=1, context_tokens=4_096, sequences=8)
    yield model
    model.close()


@pytest.fixture(scope="session")
def prompts(served_model: Model) -> Prompts:
    return Prompts(served_model)
