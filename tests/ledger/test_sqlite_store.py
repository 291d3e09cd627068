"""The base of the stores beside the ledger: what is opened, what is refused, and in which words."""

import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table, insert, select

from appliance.errors import StorageFull, Unavailable
from appliance.ledger.sqlite_store import SqliteStore, StoreSpec

pytestmark = pytest.mark.anyio

METADATA = MetaData()
ABOUT = Table("about", METADATA, Column("version", Integer, primary_key=True))
NOTES = Table("notes", METADATA, Column("text", String, primary_key=True))
SPEC = StoreSpec(
    name="notes-store",
    metadata=METADATA,
    version=2,
    adds_to=1,
    pragmas=("journal_mode=WAL",),
    unavailable=Unavailable,
    cannot_grow="notes cannot grow ({reason})",
    cannot_be_used="notes cannot be used ({reason})",
    other_version="{place} has version {found}, this program knows {known}",
)


class Notes(SqliteStore):
    @classmethod
    async def open(cls, path: Path) -> "Notes":
        return await cls._open(f"sqlite:///{path}", SPEC)

    async def add(self, text: str) -> None:
        await self._transact(lambda connection: connection.execute(insert(NOTES), [{"text": text}]))

    async def read(self) -> list[str]:
        return list(await self._transact(lambda connection: connection.execute(select(NOTES.c.text)).scalars().all()))


def written_version(path: Path, version: int) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE about (version INTEGER PRIMARY KEY)")
        connection.execute("INSERT INTO about VALUES (?)", (version,))
    connection.close()


async def test_a_store_keeps_what_it_is_given_in_a_file_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "below" / "notes.sqlite"
    for text in ("one", "two"):
        store = await Notes.open(path)
        await store.add(text)
        await store.close()
    store = await Notes.open(path)
    assert await store.read() == ["one", "two"]
    await store.close()
    assert path.stat().st_mode & 0o777 == 0o600


async def test_tables_that_an_older_version_lacks_are_added(tmp_path: Path) -> None:
    path = tmp_path / "notes.sqlite"
    written_version(path, 1)
    store = await Notes.open(path)
    await store.add("one")
    await store.close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT version FROM about").fetchall() == [(2,)]
    connection.close()


async def test_a_newer_version_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "notes.sqlite"
    written_version(path, 3)
    with pytest.raises(Unavailable, match="has version 3, this program knows 2"):
        await Notes.open(path)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall() == [("about",)]
    connection.close()


async def test_damage_is_found_when_opening(tmp_path: Path) -> None:
    path = tmp_path / "notes.sqlite"
    store = await Notes.open(path)
    for number in range(100):
        await store.add(f"{number} " * 200)
    await store.close()
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * 4096)
    with pytest.raises(Unavailable, match="notes cannot be used"):
        await Notes.open(path)


async def test_a_full_disk_is_storage_full_and_passes(tmp_path: Path) -> None:
    path = tmp_path / "notes.sqlite"
    store = await Notes.open(path)
    await store._transact(lambda connection: connection.exec_driver_sql("PRAGMA max_page_count = 5"))
    with pytest.raises(StorageFull, match="notes cannot grow"):
        await store.add("x" * 100_000)
    await store._transact(lambda connection: connection.exec_driver_sql("PRAGMA max_page_count = 1000"))
    await store.add("y")
    assert await store.read() == ["y"]
    await store.close()
