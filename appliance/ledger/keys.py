"""API keys made by command, in the ledger's database: only their SHA-256 is stored.

Blocking; a node calls it from a thread. A revoked key stays as a row, so that its name in old decisions still means it.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, RowMapping, func, insert, select, update

from appliance.config import KeySettings
from appliance.errors import NotFound, RequestError
from appliance.ledger.database import explaining_errors, open_reader, open_writer
from appliance.ledger.tables import api_keys


@dataclass(frozen=True, slots=True)
class StoredKey:
    key: KeySettings
    created_at: float
    revoked_at: float | None


def add_key(url: str, key: KeySettings) -> None:
    """Store a new key. Raises RequestError where its name has been used before, LedgerUnavailable."""
    settings = key.model_dump(mode="json", exclude={"name", "sha256"}, exclude_defaults=True)
    row = {"name": key.name, "sha256": key.sha256, "settings": json.dumps(settings), "created_at": time.time()}
    engine = open_writer(url)
    try:
        with explaining_errors(url, "written"), engine.begin() as connection:
            if connection.execute(select(api_keys.c.name).where(api_keys.c.name == key.name)).first():
                raise RequestError(f"there is, or was, a key named {key.name!r}: choose another name")
            connection.execute(insert(api_keys), [row])
    finally:
        engine.dispose()


def revoke_key(url: str, name: str) -> None:
    """Make a key useless from now on. Raises NotFound where there is no such key in use, LedgerUnavailable."""
    engine = open_writer(url)
    try:
        with explaining_errors(url, "written"), engine.begin() as connection:
            in_use = (api_keys.c.name == name) & api_keys.c.revoked_at.is_(None)
            if not connection.execute(update(api_keys).where(in_use).values(revoked_at=time.time())).rowcount:
                raise NotFound(f"there is no key {name!r} in use; `appliance keys list` shows those there are")
    finally:
        engine.dispose()


def list_keys(url: str) -> Sequence[StoredKey]:
    """Every key there is or was, oldest first. Raises LedgerUnavailable."""
    engine = open_reader(url)
    try:
        with explaining_errors(url, "read"), engine.connect() as connection:
            return read_keys(connection)
    finally:
        engine.dispose()


def read_keys(connection: Connection) -> Sequence[StoredKey]:
    rows = connection.execute(select(api_keys).order_by(api_keys.c.created_at, api_keys.c.name)).mappings()
    return [_stored(row) for row in rows]


def read_keys_mark(connection: Connection) -> tuple[Any, ...]:
    """Changes when a key is added or revoked: cheap to ask for every second or two."""
    row = connection.execute(
        select(func.count(), func.max(api_keys.c.created_at), func.count(api_keys.c.revoked_at))
    ).one()
    return tuple(row)


def _stored(row: RowMapping) -> StoredKey:
    settings: Mapping[str, Any] = json.loads(row["settings"])
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    key = KeySettings.model_validate({"name": row["name"], "sha256": row["sha256"], **fields})
    return StoredKey(key, row["created_at"], row["revoked_at"])
