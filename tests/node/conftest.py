"""A server of files, and a store of models."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.node.models.model_store import ModelStore
from tests.node.file_server import FileServer, serving
from tests.node.pulled import CONTENT


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving() as running:
        running.files["/model.gguf"] = CONTENT
        yield running


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "data")
