"""Which vLLM is checked: one in an environment of its own, or one that some Python on this machine can import."""

import json
import os
import subprocess
from pathlib import Path

from appliance.config import EngineSettings
from appliance.engines.vllm import InstalledVllm
from appliance.node.vllm.environments import find_vllm, list_installed, locate_engines_folder, select_installed

_ASK = """
import importlib.metadata, json, sys
found = importlib.metadata.distribution("vllm")
print(json.dumps([found.version, str(found.locate_file("")), "%d.%d" % sys.version_info[:2]]))
"""


def vllm_of(folder: Path | None, python: str | None, *, cpu: bool, scratch: Path) -> InstalledVllm | str:
    """The vLLM to check, or a sentence that says what to do. `python`: an interpreter that can import it; PYTHONPATH
    counts, too."""
    if folder is not None:
        return find_vllm(folder) or f"{folder} is no environment with vLLM (bin/vllm, bin/python and its packages)"
    if python is not None:
        return wrapped(python, scratch)
    if cpu:
        here = [one for one in list_installed(locate_engines_folder(os.environ)) if one.is_cpu]
        return here[0] if here else "no vLLM for CPUs here: `appliance engines install vllm --cpu`, or --vllm FOLDER"
    found = select_installed(EngineSettings(), os.environ)
    if found is None or found.is_cpu:
        return "no vLLM for GPUs here: `appliance engines install vllm`, --vllm FOLDER, or --vllm-python PYTHON"
    return found


def wrapped(python: str, scratch: Path) -> InstalledVllm | str:
    """An environment's folder around an interpreter that can import vLLM, packages on its PYTHONPATH included."""
    asked = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, check=False)
    if asked.returncode:
        said = (asked.stderr.strip().splitlines() or ["nothing was said"])[-1]
        return f"{python} cannot import vLLM: {said}"
    version, site, number = json.loads(asked.stdout)
    folder = scratch / "vllm"
    packages = folder / "lib" / f"python{number}"
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    packages.mkdir(parents=True, exist_ok=True)
    link = packages / "site-packages"
    link.unlink(missing_ok=True)
    link.symlink_to(site)
    path = os.environ.get("PYTHONPATH", "")
    # The node starts engines without its own PYTHONPATH; this one's is part of its environment.
    _program(folder / "bin" / "python", f'#!/bin/sh\nPYTHONPATH={_quoted(path)} exec {_quoted(python)} "$@"\n')
    _program(folder / "bin" / "vllm", "from vllm.entrypoints.cli.main import main\n\nmain()\n")
    found = find_vllm(folder)
    return found or f"{python} imports vLLM {version} from {site}, where its metadata is not found"


def _program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
