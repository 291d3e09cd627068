"""A node as a user starts it, with the real embedded model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import RunningNode, running_node

SMALL_ENGINE = """\
[engine]
threads = 1
context_tokens = 8192
sequences = 20
"""
"""One thread: llama.cpp's threads step on each other when a test suite runs beside them."""


def home_with_model(home: Path, model: Path) -> Path:
    folder = home / "models" / "smollm2-135m-instruct"
    folder.mkdir(parents=True)
    (folder / "q4_1.gguf").symlink_to(model)
    return home


@pytest.fixture(scope="module")
def node(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    """One for all tests of a module that leave it running as they found it."""
    home = home_with_model(tmp_path_factory.mktemp("node"), smollm2_path)
    with running_node(home, config=SMALL_ENGINE) as running:
        yield running
