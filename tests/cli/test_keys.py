"""appliance keys"""

import hashlib
import tomllib

from typer.testing import CliRunner

from appliance.cli.keys import app
from appliance.config import NodeConfig


def test_a_key_is_shown_once_and_the_printed_row_is_valid_configuration() -> None:
    done = CliRunner().invoke(app, ["billing", "--residency", "onsite"])
    assert done.exit_code == 0
    row = tomllib.loads(done.stdout[done.stdout.index("[[keys]]") :])
    key = next(line.strip() for line in done.stdout.splitlines() if line.strip().startswith("apl_"))
    assert row["keys"][0]["sha256"] == hashlib.sha256(key.encode()).hexdigest()
    rows = tuple({name: tuple(v) if isinstance(v, list) else v for name, v in item.items()} for item in row["keys"])
    (parsed,) = NodeConfig.model_validate({"keys": rows}).keys
    assert (parsed.residency, parsed.scopes) == ("onsite", ("client",))


def test_an_unknown_residency_is_refused_and_no_key_is_made() -> None:
    done = CliRunner().invoke(app, ["billing", "--residency", "europe"])
    assert done.exit_code == 1
    assert "region:XX" in done.stderr
    assert "apl_" not in done.stdout
