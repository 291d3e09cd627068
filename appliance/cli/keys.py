"""appliance keys: API keys, shown once and stored as a hash."""

import hashlib
import json
import secrets
from typing import Annotated

import typer
from pydantic import ValidationError

from appliance.cli.output import fail, say
from appliance.config import Key

app = typer.Typer(help="API keys for the node's HTTP API.", no_args_is_help=True)

_PREFIX = "apl_"


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Who will use the key, for example billing-batch.")],
    residency: Annotated[
        str, typer.Option(help="Bind everything sent with this key: onsite, region:XX or any.")
    ] = "any",
    admin: Annotated[
        bool, typer.Option("--admin", help="Allow the key to see every decision and the metrics.")
    ] = False,
) -> None:
    """Make a key. It is printed once; the configuration file gets only its SHA-256."""
    text = _PREFIX + secrets.token_urlsafe(32)
    scopes: list[str] = ["client", "admin"] if admin else ["client"]
    digest = hashlib.sha256(text.encode()).hexdigest()
    try:
        key = Key.model_validate({"name": name, "sha256": digest, "scopes": tuple(scopes), "residency": residency})
    except ValidationError as error:
        first = error.errors()[0]
        fail(f"{first['loc'][0]}: {first['msg'].removeprefix('Value error, ')} (it is {first['input']!r})")
    say(f"The key, shown this once:\n\n    {text}\n\nAdd these lines to the node's configuration file:\n")
    rows = {"name": key.name, "sha256": key.sha256, "scopes": scopes, "residency": key.residency}
    # A JSON string or array of strings is a TOML one too.
    say("[[keys]]\n" + "\n".join(f"{field} = {json.dumps(value)}" for field, value in rows.items()))
