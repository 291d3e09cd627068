"""Guards around every test, and the one real model that the tests share."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test sees the operator's keys or home, so none can spend money or leave traces."""
    for name in list(os.environ):
        if name.endswith("_API_KEY") or (name.startswith("APPLIANCE_") and not name.startswith("APPLIANCE_TEST_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("APPLIANCE_HOME", str(tmp_path_factory.mktemp("home")))
    yield


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The embedded model's GGUF: taken from APPLIANCE_TEST_MODEL, or pulled once into a cache that outlives the run."""
    given = os.environ.get("APPLIANCE_TEST_MODEL")
    if given:
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "appliance-tests"
    path = cache / "models" / "smollm2-135m-instruct" / "q4_1.gguf"
    if not path.exists():
        done = subprocess.run(
            [sys.executable, "-m", "appliance", "models", "pull", "smollm2-135m-instruct", "--data-dir", str(cache)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 or not path.exists():
            pytest.skip(f"the embedded model cannot be pulled: {done.stderr.strip()[-300:]}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SMOLLM2_SHA256:
            pytest.skip(f"{path} is not the embedded model; remove it to have it pulled again")
    return path
