"""appliance policy: check and show the rules that route requests."""

from pathlib import Path
from typing import Annotated

import typer

from appliance.cli.output import fail, say, say_json
from appliance.config import DEFAULT_POLICY_PATH, load_config, load_policy, provider_targets
from appliance.errors import ConfigError

app = typer.Typer(help="The routing policy.", no_args_is_help=True)

ConfigOption = Annotated[Path | None, typer.Option("--config", help="The node's configuration file (TOML).")]


@app.command()
def check(
    path: Annotated[Path | None, typer.Argument(help="A policy file; empty: the one the configuration names.")] = None,
    config_path: ConfigOption = None,
) -> None:
    """Say whether a policy is valid for this configuration; a mistake is named with its line and field."""
    try:
        config = load_config(config_path)
        path = path or (Path(config.policy) if config.policy else DEFAULT_POLICY_PATH)
        policy = load_policy(path, [*provider_targets(config), *_onsite_names(config.engine.model)])
    except ConfigError as error:
        fail(str(error))
    say(f"{path}: valid, {len(policy.routes)} routes, version {policy.version}")


@app.command()
def show(
    path: Annotated[Path | None, typer.Argument(help="A policy file; empty: the one that comes along.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with every default filled in.")] = False,
) -> None:
    """Print a policy: its text, or as JSON what the node makes of it."""
    try:
        policy = load_policy(path)
    except ConfigError as error:
        fail(str(error))
    if as_json:
        say_json({"version": policy.version, **policy.model_dump(mode="json", exclude_none=True)})
    else:
        say((path or DEFAULT_POLICY_PATH).read_text().rstrip())


def _onsite_names(model: str) -> list[str]:
    return [f"onsite/{Path(model).stem if model.endswith('.gguf') else model}"]
