"""An environment for other people's tests, in the user's cache folder: made the first time, with every hash pinned.

The SDKs' tests are in their source distributions alone, which pip fetches from the indexes that it is set up with.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from scripts.benchmarks.peers.installing import ROOT, Say
from scripts.index_settings import uv_settings

PINS: Final = ROOT / "scripts" / "requirements" / "conformance.txt"
SDKS: Final = ("openai", "anthropic")
INSTALL_SECONDS: Final = 900


class CannotInstall(Exception):
    """The message has the installer's last words."""


@dataclass(frozen=True, slots=True)
class Environment:
    folder: Path

    @property
    def bin(self) -> Path:
        return self.folder / "env" / "bin"

    @property
    def python(self) -> Path:
        return self.bin / "python"

    def sources(self, package: str) -> Path:
        """The unpacked source distribution of an SDK."""
        (found,) = (self.folder / "sources").glob(f"{package}-*/")
        return found


def cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "appliance" / "conformance"


def installed(say: Say) -> Environment:
    """Raises CannotInstall."""
    pins = PINS.read_text("utf-8")
    told = f"{pins}{platform.python_version()}{platform.machine()}"
    made = Environment(cache_folder() / hashlib.sha256(told.encode()).hexdigest()[:12])
    if (made.folder / ".complete").exists():
        return made
    say(f"installing into {made.folder} (once)")
    shutil.rmtree(made.folder, ignore_errors=True)
    made.folder.mkdir(parents=True)
    uv = _call([str(ROOT / "scripts" / "setup"), "uv"]).strip()
    _call([uv, "venv", "--quiet", "--python", sys.executable, str(made.folder / "env")])
    _call([uv, "pip", "sync", "--quiet", "--require-hashes", "--python", str(made.python), str(PINS)])
    _fetch_sources(made, pins)
    (made.folder / ".complete").touch()
    return made


def _fetch_sources(made: Environment, pins: str) -> None:
    wanted = made.folder / "sources.txt"
    wanted.write_text("\n".join(_requirement(pins, package) for package in SDKS))
    sources = made.folder / "sources"
    flags = ["--quiet", "--no-deps", "--no-binary", ",".join(SDKS), "--no-build-isolation", "--require-hashes"]
    _call([str(made.python), "-m", "pip", "download", *flags, "-r", str(wanted), "--dest", str(sources)])
    for packed in sources.glob("*.tar.gz"):
        with tarfile.open(packed) as file:
            file.extractall(sources, filter="data")
        packed.unlink()


def _requirement(pins: str, package: str) -> str:
    """The lines of one package, hashes included."""
    lines = pins.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"{package}=="))
    end = start
    while lines[end].endswith("\\"):
        end += 1
    return "\n".join(lines[start : end + 1])


def _call(command: list[str]) -> str:
    config = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    environment = {**os.environ, **uv_settings(config.stdout, os.environ), "UV_PYTHON_DOWNLOADS": "never"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=INSTALL_SECONDS
    )
    if done.returncode:
        raise CannotInstall(f"{' '.join(command[:4])}: {' '.join(done.stderr.split())[-400:]}")
    return done.stdout
