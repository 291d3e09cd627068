"""The command line: `commands` lists every command, and each module beside it holds what one of them does."""

from appliance.cli.commands import app

__all__ = ["app"]
