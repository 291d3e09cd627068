"""One file over HTTP, with everything that goes wrong on the way."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from appliance.errors import PullError
from appliance.node.models import download as module
from appliance.node.models.download import (
    Download,
    PullProgress,
    SourceRefused,
    download_file,
    part_path,
    require_space,
)
from tests.node.file_server import Fault, FileServer, serving

CONTENT = bytes(range(256)) * 20_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving() as running:
        running.files["/model"] = CONTENT
        yield running


class Attempt:
    """One call of fetch, with what it reported and how long it would have waited."""

    def __init__(self, server: FileServer, target: Path) -> None:
        self.server, self.target = server, target
        self.reports: list[PullProgress] = []
        self.waits: list[float] = []

    def run(self, *, sha256: str | None = SHA256, size_bytes: int | None = len(CONTENT), path: str = "/model") -> str:
        wanted = Download(self.server.url + path, self.target, "the model", sha256, size_bytes)
        with httpx.Client() as client:
            return download_file(wanted, self.reports.append, client=client, pause=self.waits.append)


@pytest.fixture
def attempt(server: FileServer, tmp_path: Path) -> Attempt:
    return Attempt(server, tmp_path / "deep" / "model.gguf")


def test_a_file_arrives_whole_and_proven_and_says_how_far_it_is(attempt: Attempt) -> None:
    assert attempt.run() == SHA256
    assert attempt.target.read_bytes() == CONTENT
    assert not part_path(attempt.target).exists()
    counts = [report.done_bytes for report in attempt.reports if report.step == "download"]
    assert counts == sorted(counts)
    assert counts[-1] == len(CONTENT)
    assert {report.total_bytes for report in attempt.reports} == {len(CONTENT)}


def test_a_size_that_nobody_stated_is_taken_from_the_server(attempt: Attempt) -> None:
    attempt.run(size_bytes=None)
    assert attempt.reports[-1].total_bytes == len(CONTENT)


def test_a_broken_connection_is_taken_up_where_it_broke(attempt: Attempt, server: FileServer) -> None:
    server.faults["/model"] = [Fault(stop_after_bytes=3_000_000), Fault(stop_after_bytes=1_000_000), Fault()]
    assert attempt.run() == SHA256
    assert attempt.target.read_bytes() == CONTENT
    assert server.fetched("/model") == [None, "bytes=3000000-", "bytes=4000000-"]
    assert attempt.waits == [1.0, 1.0]


def test_an_earlier_process_s_part_is_taken_up(attempt: Attempt, server: FileServer) -> None:
    attempt.target.parent.mkdir()
    part_path(attempt.target).write_bytes(CONTENT[:4_000_000])
    assert attempt.run() == SHA256
    assert server.fetched("/model") == ["bytes=4000000-"]


def test_a_part_that_is_already_whole_is_not_asked_for(attempt: Attempt, server: FileServer) -> None:
    attempt.target.parent.mkdir()
    part_path(attempt.target).write_bytes(CONTENT)
    assert attempt.run() == SHA256
    assert server.seen == []


@pytest.mark.parametrize("size_bytes", [None, len(CONTENT)])
def test_a_part_that_does_not_fit_is_thrown_away_and_all_of_it_fetched(
    attempt: Attempt, server: FileServer, size_bytes: int | None
) -> None:
    attempt.target.parent.mkdir()
    part_path(attempt.target).write_bytes(b"x" * 1000)
    assert attempt.run(size_bytes=size_bytes) == SHA256
    assert server.fetched("/model") == ["bytes=1000-", None]


def test_a_part_longer_than_the_file_is_thrown_away(attempt: Attempt, server: FileServer) -> None:
    attempt.target.parent.mkdir()
    part_path(attempt.target).write_bytes(CONTENT + b"x")
    assert attempt.run(size_bytes=None) == SHA256
    assert attempt.target.read_bytes() == CONTENT


def test_a_part_of_a_file_without_checksum_is_not_trusted(attempt: Attempt, server: FileServer) -> None:
    attempt.target.parent.mkdir()
    part_path(attempt.target).write_bytes(b"x" * 1000)
    assert attempt.run(sha256=None) == SHA256
    assert server.fetched("/model") == [None]


def test_a_server_without_ranges_sends_all_of_it_again(attempt: Attempt, server: FileServer) -> None:
    server.faults["/model"] = [Fault(stop_after_bytes=3_000_000), Fault(ignore_range=True)]
    assert attempt.run() == SHA256
    assert attempt.target.read_bytes() == CONTENT


def test_a_busy_server_is_asked_again_when_it_said_so(attempt: Attempt, server: FileServer) -> None:
    server.faults["/model"] = [Fault(status=503, headers={"retry-after": "7"}), Fault(status=429), Fault()]
    assert attempt.run() == SHA256
    assert attempt.waits == [7.0, 2.0]
    note = next(report.note for report in attempt.reports if report.step == "retry")
    assert note.startswith("the server answered 503")


def test_after_enough_tries_without_a_byte_it_gives_up_and_keeps_what_came(
    attempt: Attempt, server: FileServer
) -> None:
    server.faults["/model"] = [Fault(stop_after_bytes=2_000_000)] + [Fault(status=502)] * 20
    with pytest.raises(PullError, match=r"the model.*502.*2000000 bytes are kept"):
        attempt.run()
    assert len(attempt.waits) == module.TRIES - 1
    assert max(attempt.waits) <= module.LONGEST_WAIT_SECONDS
    server.faults.clear()
    assert attempt.run() == SHA256
    assert server.fetched("/model")[-1] == "bytes=2000000-"


def test_a_server_that_is_not_there_is_a_pull_error(attempt: Attempt, server: FileServer) -> None:
    server.url = "http://127.0.0.1:1"
    with pytest.raises(PullError, match="check the network"):
        attempt.run()


@pytest.mark.parametrize(("status", "kind"), [(401, SourceRefused), (403, SourceRefused), (404, PullError)])
def test_a_plain_no_is_not_asked_twice(
    attempt: Attempt, server: FileServer, status: int, kind: type[PullError]
) -> None:
    server.faults["/model"] = [Fault(status=status)]
    with pytest.raises(kind, match=str(status)):
        attempt.run()
    assert attempt.waits == []


@pytest.mark.parametrize(
    ("sha256", "size_bytes"), [("0" * 64, len(CONTENT)), ("0" * 64, None), (None, len(CONTENT) - 1)]
)
def test_other_bytes_than_expected_are_thrown_away(
    attempt: Attempt, sha256: str | None, size_bytes: int | None
) -> None:
    with pytest.raises(PullError, match="thrown away"):
        attempt.run(sha256=sha256, size_bytes=size_bytes)
    assert list(attempt.target.parent.iterdir()) == []


def test_a_full_disk_is_named_with_what_is_free(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PullError, match=r"disk is full \(\d+ bytes free"):
        attempt.run()


def test_too_little_room_is_named_with_both_numbers(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    require_space(tmp_path, 1, "the model")
    with pytest.raises(PullError, match=r"it needs \d+ bytes in .*, \d+ are free"):
        require_space(tmp_path, free, "the model")
