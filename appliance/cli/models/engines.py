"""appliance engines: the inference engines that are programs of their own, in environments of their own."""

import os
from typing import Annotated

import typer

from appliance.cli.options import ConfigOption, JsonOption
from appliance.cli.output import exit_on_error, fail, format_bytes, say, say_json, stderr
from appliance.config import load_config
from appliance.node.vllm.environments import list_installed, locate_engines_folder, select_installed
from appliance.node.vllm.install import install_vllm, is_complete, read_pins, remove_environment

_EngineArgument = Annotated[str, typer.Argument(help="vllm")]


def install_command(
    engine: _EngineArgument = "vllm",
    cpu: Annotated[bool, typer.Option("--cpu", help="The build for CPUs, for machines without a GPU.")] = False,
) -> None:
    """Make an environment with vLLM in the user's cache: the versions this release was made for, checked by hash."""
    if engine != "vllm":
        fail(f"{engine!r} cannot be installed: vllm can")
    pins = exit_on_error(lambda: read_pins("cpu" if cpu else "gpu"))
    stderr.print(f"vLLM {pins.version}: {pins.packages} packages")
    with stderr.status("") as status:

        def report(text: str) -> None:
            status.update(text)
            if not stderr.is_terminal:
                stderr.print(text)

        made = exit_on_error(lambda: install_vllm(pins, locate_engines_folder(os.environ), report))
    say(f"vLLM {made.version} is in {made.folder}; the node uses the newest one (engine.vllm names another)")


def list_command(config_path: ConfigOption = None, as_json: JsonOption = False) -> None:
    """The vLLMs on this machine, and which one the node uses."""
    config = exit_on_error(lambda: load_config(config_path))
    used = exit_on_error(lambda: select_installed(config.engine, os.environ))
    here = list(list_installed(locate_engines_folder(os.environ)))
    if used is not None and used.folder not in [one.folder for one in here]:
        here.append(used)
    rows = [
        {
            "engine": "vllm",
            "version": one.version,
            "folder": str(one.folder),
            "cpu": one.is_cpu,
            "used": used is not None and one.folder == used.folder,
            "whole": is_complete(one),
        }
        for one in here
    ]
    if as_json:
        say_json(rows)
        return
    if not rows:
        say("no vLLM here; `appliance engines install vllm` gets it (with --cpu: the build for CPUs)")
    for row in rows:
        state = "used by the node" if row["used"] else "not finished: install it again" if not row["whole"] else ""
        say(f"vllm {row['version']:<14} {row['folder']}  {state}".rstrip())


def remove_command(
    version: Annotated[str, typer.Argument(help="As `appliance engines list` shows it.")],
) -> None:
    """Delete an environment that was installed by command."""
    here = list_installed(locate_engines_folder(os.environ))
    found = next((one for one in here if one.version == version), None)
    if found is None:
        known = ", ".join(one.version for one in here) or "none"
        fail(f"no vLLM {version!r} was installed by command; there are: {known}")
    size = sum(path.lstat().st_size for path in found.folder.rglob("*"))
    remove_environment(found)
    say(f"removed {found.folder} ({format_bytes(size)})")
