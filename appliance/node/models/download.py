"""One file over HTTP: resumed where it stopped, its checksum taken while it is written, never half there.

The bytes are collected beside the target in a `.part` file, which outlives the process; the target appears by one
rename when size and checksum are right.
"""

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

import httpx

from appliance.errors import PullError

CHUNK_BYTES = 1 << 20
TRIES = 6
"""In a row without a single new byte; a try that got further starts the count anew."""
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 30.0
SPARE_BYTES = 64 << 20
"""Left free on the disk, so that a pull never starves the ledger beside it."""
TIMEOUT = httpx.Timeout(30.0, connect=10.0)
"""30 s without a byte is a broken connection; a new one resumes."""
WORTH_RETRYING = frozenset({408, 425, 429, 500, 502, 503, 504})

PullStep = Literal["wait", "resolve", "download", "retry", "join", "verify", "copy", "ready"]


@dataclass(frozen=True, slots=True)
class PullProgress:
    """Where a pull is. `total_bytes` is None while unknown; both counts are of the present step and file."""

    step: PullStep
    what: str
    done_bytes: int = 0
    total_bytes: int | None = None
    note: str = ""


PullReporter = Callable[[PullProgress], None]


@dataclass(frozen=True, slots=True)
class Download:
    """What to get. With `sha256` the bytes are proven; with `size_bytes` a short file is noticed."""

    url: str
    target: Path
    what: str
    """Its name for people: a file or package, not an address."""
    sha256: str | None = None
    size_bytes: int | None = None
    headers: Mapping[str, str] | None = None


class SourceRefused(PullError):
    """The source wants a login, or one with more rights."""


class _Again(Exception):
    """This try failed in a way that another may not; `wait_seconds` is what the server asked for."""

    def __init__(self, reason: str, wait_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds


def download_file(
    download: Download,
    report: PullReporter,
    *,
    client: httpx.Client,
    pause: Callable[[float], None] = time.sleep,
) -> str:
    """Get the file, resuming what is there, and return its sha256.

    Raises PullError naming the step, what was expected and what to do. Nothing is contacted if the part is whole.
    """
    download.target.parent.mkdir(parents=True, exist_ok=True)
    part = part_path(download.target)
    if download.sha256 is None:
        # Nothing says that an older part belongs to the same bytes.
        part.unlink(missing_ok=True)
    wait_seconds, tries = FIRST_WAIT_SECONDS, 0
    while True:
        before = _size(part)
        try:
            return _one_try(download, part, report, client)
        except _Again as failure:
            advanced = _size(part) > before
            tries = 1 if advanced else tries + 1
            wait_seconds = FIRST_WAIT_SECONDS if advanced else wait_seconds
            if tries >= TRIES:
                raise PullError(
                    f"downloading {download.what}: {failure}, {tries} times in a row; {_size(part)} bytes are kept and "
                    "the next pull goes on from there; check the network or the proxy settings"
                ) from failure
            wait = min(failure.wait_seconds or wait_seconds, LONGEST_WAIT_SECONDS)
            note = f"{failure}; trying again in {wait:.0f} s"
            report(PullProgress("retry", download.what, _size(part), download.size_bytes, note))
            pause(wait)
            wait_seconds *= 2
        except OSError as error:
            raise explain_disk_error(error, download.target, download.what) from error


def part_path(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _one_try(download: Download, part: Path, report: PullReporter, client: httpx.Client) -> str:
    """Go on from the part that is there; the whole file's sha256, or _Again."""
    digest = hashlib.sha256()
    with part.open("a+b") as file:
        file.seek(0)
        kept = done = _digest_into(digest, file, PullProgress("verify", download.what, 0, download.size_bytes), report)
        if download.size_bytes is None or done < download.size_bytes:
            done, digest = _receive(download, file, done, digest, report, client)
        file.flush()
        os.fsync(file.fileno())
    found = digest.hexdigest()
    wrong = (download.size_bytes is not None and done != download.size_bytes) or (
        download.sha256 is not None and found != download.sha256
    )
    if wrong:
        part.unlink()
        if kept:
            raise _Again("what was kept of an earlier try does not fit; starting anew")
        raise PullError(
            f"checking {download.what}: expected {download.size_bytes or 'any number of'} bytes with sha256 "
            f"{download.sha256 or '(unknown)'}, got {done} bytes with {found}; what came has been thrown away: "
            "pull again, and if it stays so, the file at the source has changed"
        )
    part.replace(download.target)
    return found


def _digest_into(digest: "hashlib._Hash", file: BinaryIO, shown: PullProgress, report: PullReporter) -> int:
    done = 0
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
        done += len(chunk)
        report(replace(shown, done_bytes=done, note="what is already there"))
    return done


def _receive(
    download: Download, file: BinaryIO, done: int, digest: "hashlib._Hash", report: PullReporter, client: httpx.Client
) -> tuple[int, "hashlib._Hash"]:
    headers = {**(download.headers or {}), "accept-encoding": "identity"}
    if done:
        headers["range"] = f"bytes={done}-"
    try:
        with client.stream("GET", download.url, headers=headers, timeout=TIMEOUT, follow_redirects=True) as response:
            _check_status(download, response, done)
            if done and not _continues(response, done):
                # The server sends all of it again, or something else than was asked for: start anew.
                file.truncate(0)
                done, digest = 0, hashlib.sha256()
            if response.status_code == 416:
                raise _Again("the server had nothing beyond what is already there; starting anew")
            total = _total(download, response, done)
            reported = done
            # As it comes: with a chunk size, what had come of the last chunk would be lost when the connection breaks.
            for chunk in response.iter_raw():
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                if done - reported >= CHUNK_BYTES or done == total:
                    report(PullProgress("download", download.what, done, total))
                    reported = done
    except httpx.TransportError as error:
        raise _Again(f"the connection failed ({type(error).__name__}: {error})".rstrip(": ")) from error
    if total is not None and done < total:
        raise _Again(f"the connection ended after {done} of {total} bytes")
    return done, digest


def _continues(response: httpx.Response, done: int) -> bool:
    return response.status_code == 206 and response.headers.get("content-range", "").startswith(f"bytes {done}-")


def _total(download: Download, response: httpx.Response, done: int) -> int | None:
    if download.size_bytes is not None:
        return download.size_bytes
    length = response.headers.get("content-length", "")
    return done + int(length) if length.isdigit() else None


def _check_status(download: Download, response: httpx.Response, done: int) -> None:
    status = response.status_code
    if status in (200, 206) or (status == 416 and done):
        return
    if status in WORTH_RETRYING:
        asked = response.headers.get("retry-after", "")
        raise _Again(f"the server answered {status}", float(asked) if asked.isdigit() else None)
    begin = f"downloading {download.what}: the server answered {status};"
    if status in (401, 403, 407):
        raise SourceRefused(
            f"{begin} set the token or credentials that the source wants, and accept the model's licence there"
        )
    if status in (404, 410):
        raise PullError(f"{begin} the source no longer has it; take another variant or model of the catalogue")
    raise PullError(f"{begin} see what the source says of it, or take another one")


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise PullError unless the disk of `folder` has room for `needed_bytes` and some spare."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + SPARE_BYTES:
        raise PullError(
            f"making room for {what}: it needs {needed_bytes + SPARE_BYTES} bytes in {folder}, {free} are free; "
            "free some, or choose another folder with --data-dir"
        )


def explain_disk_error(error: OSError, target: Path, what: str) -> PullError:
    """An OSError of writing as a PullError with the remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(target.parent).free
        return PullError(
            f"writing {what}: the disk is full ({free} bytes free at {target.parent}); free some, pull again"
        )
    return PullError(f"writing {what}: {error.strerror or error} ({target}); check that the data folder is writable")


def hash_file(path: Path, shown: PullProgress, report: PullReporter) -> str:
    """The sha256 of a file, reporting on the way."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            report(replace(shown, done_bytes=done, total_bytes=total))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class PullContext:
    """Where a pull works, and where it reports its progress."""

    folder: Path
    """Holds what is only half there; it survives until the pull succeeds."""
    client: httpx.Client
    report: PullReporter


def require_checksum(step: str, expected: str | None, found: str) -> None:
    """Raise PullError unless `found` is the expected sha256, or none is expected."""
    if expected is not None and found != expected:
        raise PullError(f"{step}: expected sha256 {expected}, got {found}; pull again, or report a changed source")


def resolve_inside(folder: Path, file: str) -> Path:
    """The path of `file` in `folder`. Raises PullError when it would lie outside."""
    target = (folder / file).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise PullError(f"the source names a file outside the model's folder: {file!r}")
    return target
