"""Full disks, locks, damage and foreign files: hosted spend stops, the node goes on, and it heals by itself."""

import asyncio
import errno
import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, event

from appliance.errors import LedgerUnavailable
from appliance.ledger import database
from appliance.ledger.report import offline_report
from appliance.ledger.store import Ledger
from tests.ledger.samples import HOSTED, NOW_AT, outcome, until, url_in

pytestmark = pytest.mark.anyio


def mount_tmpfs(folder: Path, options: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"this machine lets nobody mount: {done.stderr.decode().strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount_tmpfs(folder, "size=1m")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@dataclass
class Disk:
    """A place that can be filled up and emptied again."""

    folder: Path
    fill: Callable[[], None]
    empty: Callable[[], None]


def real_disk(folder: Path) -> Disk:
    filler = folder / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 4096)
            except OSError as error:
                assert error.errno == errno.ENOSPC

    return Disk(folder, fill, filler.unlink)


@pytest.fixture(params=["a full file system", "SQLite's own limit"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    if request.param == "a full file system":
        yield real_disk(request.getfixturevalue("small_disk"))
        return
    pages = 1_000_000

    def limit(connection: Connection) -> None:
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")

    def set_pages(number: int) -> None:
        nonlocal pages
        pages = number

    event.listen(Engine, "begin", limit)
    yield Disk(tmp_path, lambda: set_pages(1), lambda: set_pages(1_000_000))
    event.remove(Engine, "begin", limit)


async def reserve_until_refused(ledger: Ledger) -> LedgerUnavailable:
    for _ in range(5000):
        try:
            await ledger.reserve(decision_id="dec_0", target=HOSTED, usd=0.001)
        except LedgerUnavailable as error:
            return error
    raise AssertionError("a full disk never refused a reservation")


async def test_a_full_disk_stops_hosted_spend_and_heals_when_there_is_room_again(disk: Disk) -> None:
    ledger = await Ledger.open(url_in(disk.folder), max_pending=300)
    ledger.record(outcome("before"))
    await ledger.flush()
    disk.fill()

    refused = await reserve_until_refused(ledger)
    assert "full" in refused.message
    assert str(disk.folder / "ledger.db") in refused.message
    assert "free space" in refused.message
    assert refused.status == 503
    assert refused.retry_after_seconds is not None

    for number in range(400):
        ledger.record(outcome(f"during_{number}"))
    with pytest.raises(LedgerUnavailable):
        await ledger.flush()
    health = ledger.health()
    assert not health.ok
    assert "full" in health.reason
    assert (health.pending, health.dropped) == (300, 100)
    assert await ledger.read_decision("before") is not None, "reading goes on"

    disk.empty()
    await until(lambda: ledger.health().ok and ledger.health().pending == 0)
    await ledger.reserve(decision_id="dec_1", target=HOSTED, usd=0.001)
    assert await ledger.read_decision("during_299") is not None
    assert ledger.health().dropped == 100
    await ledger.close()


async def test_health_recovers_even_when_nothing_waits_to_be_written(disk: Disk) -> None:
    ledger = await Ledger.open(url_in(disk.folder))
    disk.fill()
    await reserve_until_refused(ledger)
    assert not ledger.health().ok

    disk.empty()

    await until(lambda: ledger.health().ok)
    await ledger.close()


async def test_settlements_are_kept_even_when_outcomes_are_dropped(disk: Disk) -> None:
    ledger = await Ledger.open(url_in(disk.folder), max_pending=1, clock=lambda: NOW_AT)
    reservation = await ledger.reserve(decision_id="dec_1", target=HOSTED, usd=1.0)
    disk.fill()
    await reserve_until_refused(ledger)
    ledger.record(outcome("dec_1"))
    ledger.record(outcome("dec_2"))
    ledger.settle(reservation, usd=0.5)
    disk.empty()
    await until(lambda: ledger.health().pending == 0)

    story = await ledger.read_decision("dec_1")

    assert story is not None
    assert story["reservations"][0]["settled_usd"] == 0.5
    assert ledger.health().dropped == 1
    await ledger.close()


async def test_closing_on_a_full_disk_says_what_could_not_be_written(disk: Disk) -> None:
    ledger = await Ledger.open(url_in(disk.folder))
    disk.fill()
    await reserve_until_refused(ledger)
    for number in range(300):
        ledger.record(outcome(f"dec_{number}"))

    with pytest.raises(LedgerUnavailable, match="full"):
        await ledger.close()
    disk.empty()


async def test_a_lock_held_by_another_process_refuses_and_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    ledger = await Ledger.open(url_in(tmp_path))
    other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with pytest.raises(LedgerUnavailable, match=r"locked; another process holds it"):
        await ledger.reserve(decision_id="dec_1", target=HOSTED, usd=0.02)
    ledger.record(outcome())
    assert not ledger.health().ok

    other.execute("ROLLBACK")
    other.close()
    await until(lambda: ledger.health().ok and ledger.health().pending == 0)
    await ledger.reserve(decision_id="dec_1", target=HOSTED, usd=0.02)
    await ledger.close()


async def test_a_short_lock_is_waited_for(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path))
    other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    waiting = asyncio.create_task(ledger.reserve(decision_id="dec_1", target=HOSTED, usd=0.02))
    await asyncio.sleep(0)
    other.execute("ROLLBACK")
    other.close()

    assert (await waiting).startswith("res_")
    await ledger.close()


async def test_a_file_that_is_no_database_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_bytes(b"this is a shopping list, not a ledger\n" * 200)

    with pytest.raises(LedgerUnavailable, match=r"ledger\.db' cannot be opened: file is not a database; it is damaged"):
        await Ledger.open(url_in(tmp_path))


@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
async def test_a_damaged_ledger_is_found_when_opening(tmp_path: Path, damage: str) -> None:
    ledger = await Ledger.open(url_in(tmp_path))
    for number in range(500):
        ledger.record(outcome(f"dec_{number}"))
    await ledger.close()
    path = tmp_path / "ledger.db"
    content = path.read_bytes()
    middle = len(content) // 2 // 4096 * 4096
    path.write_bytes(content[:middle] + (b"" if damage == "truncated" else b"\xa5" * 16384 + content[middle + 16384 :]))

    with pytest.raises(LedgerUnavailable, match=r"ledger\.db' cannot be opened: .*damaged.* restore a copy"):
        await Ledger.open(url_in(tmp_path))


async def test_damage_that_shows_in_use_is_told_with_the_remedy(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path))
    for number in range(500):
        ledger.record(outcome(f"dec_{number}"))
    await ledger.close()
    ledger = await Ledger.open(url_in(tmp_path))
    with (tmp_path / "ledger.db").open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))

    with pytest.raises(LedgerUnavailable, match=r"cannot be read: .*malformed; it is damaged: move the file"):
        await ledger.read_report(since_at=0, until_at=NOW_AT + 1)
    await ledger.close()


@pytest.fixture
def protected(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "protected"
    folder.mkdir()
    if os.geteuid() == 0:
        # Modes do not stop root, a read-only file system does.
        mount_tmpfs(folder, "ro")
        yield folder
        subprocess.run(["umount", "-l", str(folder)], check=True)
    else:
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)


async def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(protected: Path) -> None:
    with pytest.raises(LedgerUnavailable, match=r"protected/ledger\.db' cannot be opened: .*make the file and its"):
        await Ledger.open(url_in(protected))


async def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerUnavailable, match=r"file/ledger\.db' cannot be opened: .*ledger\.url"):
        await Ledger.open(url_in(tmp_path / "file"))


async def test_a_newer_ledger_is_not_touched(tmp_path: Path) -> None:
    await (await Ledger.open(url_in(tmp_path))).close()
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()

    with pytest.raises(LedgerUnavailable, match=r"ledger\.db' was written by a newer appliance \(schema 9999"):
        await Ledger.open(url_in(tmp_path))
    with pytest.raises(LedgerUnavailable, match="newer appliance"):
        offline_report(url_in(tmp_path), since_at=0, until_at=1)


async def test_somebody_elses_database_is_not_touched(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()

    with pytest.raises(LedgerUnavailable, match=r"holds other tables \(recipes\) and no ledger"):
        await Ledger.open(url_in(tmp_path))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("no url at all", "is not a database URL"),
        ("postgresql+psycopg9://anna:hunter2@db.example/ledger", "install the driver"),
        ("nosuchdatabase://db.example/ledger", "install the driver"),
    ],
)
async def test_a_url_that_cannot_work_is_explained_without_its_password(url: str, message: str) -> None:
    with pytest.raises(LedgerUnavailable, match=message) as caught:
        await Ledger.open(url)
    assert "hunter2" not in caught.value.message


def test_a_report_of_no_ledger_says_so(tmp_path: Path) -> None:
    with pytest.raises(LedgerUnavailable, match=r"there is no ledger at .*ledger\.db'"):
        offline_report(url_in(tmp_path), since_at=0, until_at=1)
    assert not (tmp_path / "ledger.db").exists()


@pytest.mark.anyio
async def test_a_ledger_that_was_deleted_while_it_is_open_reserves_nothing_more(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path))
    await ledger.reserve(decision_id="dec_1", target=HOSTED, usd=0.02)
    (tmp_path / "ledger.db").rename(tmp_path / "elsewhere.db")
    with pytest.raises(LedgerUnavailable, match="deleted or replaced while the node runs"):
        await ledger.reserve(decision_id="dec_2", target=HOSTED, usd=0.02)
    assert not ledger.health().ok
    (tmp_path / "elsewhere.db").rename(tmp_path / "ledger.db")
    await ledger.reserve(decision_id="dec_3", target=HOSTED, usd=0.02)
    await ledger.close()
