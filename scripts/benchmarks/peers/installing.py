"""Environments of the programs that the appliance is compared with.

Each is made the first time it is needed, in the user's cache folder, and kept. None is a dependency of the product.
"""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.index_settings import uv_settings

ROOT = Path(__file__).resolve().parents[3]
INSTALL_SECONDS = 3_600
"""Building llama.cpp takes 7 minutes on two idle cores and several times that on busy ones."""

Say = Callable[[str], None]


class PeerMissing(Exception):
    """A peer cannot be installed or started here; the message says why."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What one peer needs. `without` are packages that others ask for and that do harm here."""

    name: str
    requirements: tuple[str, ...]
    without: tuple[str, ...] = ()
    finish: "Callable[[Environment], None] | None" = None
    """What is left to do once everything is installed."""

    @property
    def folder(self) -> Path:
        # What is built, is built for this very machine and interpreter.
        told = repr((self.requirements, self.without, platform.python_version(), platform.machine()))
        return peers_folder() / f"{self.name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.folder / "lib" / version / "site-packages"


def peers_folder() -> Path:
    """Where peers and the weights made for them are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "appliance" / "peers"


def installed(environment: Environment, say: Say) -> Environment:
    """Make the environment unless it is there. Raises PeerMissing with the installer's last words."""
    complete = environment.folder / ".complete"
    if complete.exists():
        return environment
    say(f"installing {environment.name} into {environment.folder} (once)")
    shutil.rmtree(environment.folder, ignore_errors=True)
    environment.folder.parent.mkdir(parents=True, exist_ok=True)
    log = environment.folder.with_name(f"{environment.folder.name}.log")
    try:
        uv = _uv()
        _call([uv, "venv", "--quiet", "--python", sys.executable, str(environment.folder)], log)
        left_out = environment.folder / "without.txt"
        left_out.write_text("\n".join(environment.without))
        command = [uv, "pip", "install", "--python", str(environment.python), "--excludes", str(left_out)]
        _call([*command, *environment.requirements], log)
        if environment.finish is not None:
            environment.finish(environment)
    except (OSError, subprocess.SubprocessError, PeerMissing) as error:
        shutil.rmtree(environment.folder, ignore_errors=True)
        raise PeerMissing(f"{environment.name} cannot be installed: {error}") from error
    complete.touch()
    return environment


def _uv() -> str:
    """The uv that set-up uses."""
    script = ROOT / "scripts" / "setup"
    done = subprocess.run([script, "uv"], capture_output=True, text=True, check=True, timeout=300)
    return done.stdout.strip()


def _call(command: list[str], log: Path) -> None:
    config = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    environment = {**os.environ, **uv_settings(config.stdout, os.environ), "UV_PYTHON_DOWNLOADS": "never"}
    # Not as an option: that would replace what the operator has set.
    folders = [environment.get("UV_FIND_LINKS", ""), *map(str, _built_wheels())]
    environment["UV_FIND_LINKS"] = ",".join(filter(None, folders))
    with log.open("w") as output:
        done = subprocess.run(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False, timeout=INSTALL_SECONDS
        )
    if done.returncode:
        raise PeerMissing(f"{' '.join(log.read_text().split())[-400:]} (whole log: {log})")


def own_llama_cpp() -> str:
    """llama-cpp-python with its server, in the version that we run (set-up's own build of it, see `_built_wheels`)."""
    return f"llama-cpp-python[server]=={importlib.metadata.version('llama-cpp-python')}"


def _built_wheels() -> list[Path]:
    """Folders with what was compiled on this machine before: set-up's builds, and `wheels` beside the environments.

    A wheel of the wanted version that lies there is taken instead of compiling it again.
    """
    kept = [peers_folder() / "wheels", *(peers_folder().parent / "wheels").glob("*")]
    return [folder for folder in kept if folder.is_dir()]
