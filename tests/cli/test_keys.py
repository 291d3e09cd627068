"""appliance keys"""

import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from appliance.cli import app
from appliance.ledger.database import sqlite_url
from appliance.ledger.keys import list_keys

RUN = CliRunner()


def run(home: Path, *arguments: str) -> Result:
    return RUN.invoke(app, ["keys", *arguments, "--data-dir", str(home)])


def test_a_key_is_shown_once_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    done = run(tmp_path, "create", "billing", "--residency", "onsite", "--route", "general", "--daily-usd", "2.5")
    assert done.exit_code == 0, done.stderr
    text = next(line.strip() for line in done.stdout.splitlines() if line.strip().startswith("apl_"))
    (stored,) = list_keys(sqlite_url(tmp_path / "ledger.sqlite"))
    assert stored.key.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert (stored.key.residency, stored.key.routes, stored.key.daily_usd) == ("onsite", ("general",), 2.5)
    for file in tmp_path.iterdir():
        assert text.encode() not in file.read_bytes()


def test_a_name_is_used_once_and_a_revoked_key_stays_in_the_list(tmp_path: Path) -> None:
    assert run(tmp_path, "create", "a").exit_code == 0
    again = run(tmp_path, "create", "a")
    assert again.exit_code == 1
    assert "choose another name" in again.stderr
    assert run(tmp_path, "revoke", "a").exit_code == 0
    assert "no key 'a' in use" in run(tmp_path, "revoke", "a").stderr
    (row,) = json.loads(run(tmp_path, "list", "--json").stdout)
    assert row["revoked_at"] is not None
    assert "sha256" not in row


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--residency", "europe"), "region:XX"),
        (("--daily-usd", "-1"), "it is -1"),
        (("--requests-per-minute", "0"), "it is 0"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_and_no_key_is_made(
    tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    done = run(tmp_path, "create", "a", *arguments)
    assert done.exit_code != 0
    assert words in done.stderr
    assert "apl_" not in done.stdout
    assert not (tmp_path / "ledger.sqlite").exists() or not list_keys(sqlite_url(tmp_path / "ledger.sqlite"))
