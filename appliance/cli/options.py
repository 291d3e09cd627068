"""Options that several commands share, and what they mean."""

import os
from pathlib import Path
from typing import Annotated

import typer

from appliance.catalog import Catalog, load_catalog
from appliance.cli.output import exit_on_error
from appliance.config import NodeConfig

ConfigOption = Annotated[Path | None, typer.Option("--config", help="The node's configuration file (TOML).")]
DataDirOption = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Where models, ledger and logs lie; empty: ~/.local/share/appliance"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def resolve_data_dir(option: Path | None, config: NodeConfig) -> Path:
    """The command line wins over the configuration, and that over APPLIANCE_HOME and the user's data folder."""
    if option is not None:
        return option.expanduser().resolve()
    if config.data_dir is not None:
        return Path(config.data_dir).expanduser().resolve()
    if home := os.environ.get("APPLIANCE_HOME"):
        return Path(home).expanduser().resolve()
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "appliance"


def load_node_catalog(home: Path) -> Catalog:
    """The catalogue that came with the program, and the operator's own files in DATA_DIR/model_configs."""
    return exit_on_error(lambda: load_catalog([home / "model_configs"]))
