"""Files on disk: uploads that appear whole or not at all, the copies that jobs work from, and their results."""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from appliance.errors import BodyTooLarge, StorageFull
from appliance.files import OWNER_ONLY, replacing_file, sync_to_disk

_ID: Final = re.compile(r"file-[0-9a-f]{32}")


def new_file_id() -> str:
    """128 random bits: a file cannot be found by guessing."""
    return f"file-{secrets.token_hex(16)}"


def read_free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


class JobFolder:
    """Blocking: called from threads. Nothing but ids made here becomes a path.

    `files/` holds what owners see; `work/` holds what jobs read and write, each under its batch's id.
    """

    def __init__(
        self,
        root: Path,
        *,
        max_file_bytes: int,
        min_free_bytes: int,
        free: Callable[[Path], int] = read_free_bytes,
    ) -> None:
        self._files, self._work = root / "files", root / "work"
        self._max_file_bytes, self._min_free_bytes = max_file_bytes, min_free_bytes
        self._free = free
        for folder in (self._files, self._work):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def file_path(self, file_id: str) -> Path:
        assert _ID.fullmatch(file_id)
        return self._files / file_id

    def check_space(self, needed_bytes: int = 0) -> None:
        """Raises StorageFull where less would be left than has to be."""
        free, wanted = self._free(self._files), self._min_free_bytes + needed_bytes
        if free < wanted:
            text = (
                f"{free / 1e6:.0f} MB are free on the disk and {wanted / 1e6:.0f} MB have to be (jobs.min_free_bytes)"
            )
            raise StorageFull(f"{text}: free some space", retry_after_seconds=30.0)

    @contextlib.contextmanager
    def receive_upload(self, file_id: str) -> "Iterator[UploadReceiver]":
        """A file in the making. It is there once `keep` was called; whatever ends before leaves nothing behind."""
        part = self.file_path(file_id).with_suffix(".part")
        file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, OWNER_ONLY), "wb")
        receiver = UploadReceiver(file, part, self.file_path(file_id), self._max_file_bytes, self.check_space)
        try:
            yield receiver
        finally:
            with contextlib.suppress(OSError):
                file.close()
            part.unlink(missing_ok=True)

    def remove_file(self, file_id: str) -> None:
        self.file_path(file_id).unlink(missing_ok=True)

    # What a batch works with.

    def link_input(self, file_id: str, batch_id: str) -> None:
        """Keep the input for a batch: its owner may delete the file meanwhile. Raises FileNotFoundError."""
        target = self.input_path(batch_id)
        if target.exists():
            return
        try:
            os.link(self.file_path(file_id), target)
        except PermissionError:  # file systems without hard links
            with replacing_file(target, mode=OWNER_ONLY) as draft:
                shutil.copyfile(self.file_path(file_id), draft)

    def input_path(self, batch_id: str) -> Path:
        return self._work / f"{batch_id}.in"

    def output_path(self, batch_id: str) -> Path:
        return self._work / f"{batch_id}.out"

    def error_path(self, batch_id: str) -> Path:
        return self._work / f"{batch_id}.err"

    def publish_result(self, work: Path, file_id: str, size_bytes: int) -> None:
        """Make a result a file, cut to what is committed. Doing so twice does no harm."""
        if work.exists():
            os.truncate(work, size_bytes)
            work.replace(self.file_path(file_id))

    def remove_work(self, batch_id: str) -> None:
        for path in (self.input_path(batch_id), self.output_path(batch_id), self.error_path(batch_id)):
            path.unlink(missing_ok=True)

    def remove_unknown(self, known_files: frozenset[str], open_batches: frozenset[str]) -> int:
        """Remove what the store does not know: uploads that a crash cut short, work of batches that are no more."""
        found = [path for path in self._files.iterdir() if path.name not in known_files]
        found += [path for path in self._work.iterdir() if path.stem not in open_batches]
        for path in found:
            path.unlink(missing_ok=True)
        return len(found)


class UploadReceiver:
    """Takes a file's bytes as they come. Raises BodyTooLarge, and StorageFull as soon as the disk is nearly full."""

    def __init__(self, file: BinaryIO, part: Path, path: Path, max_bytes: int, check_space: Callable[[], None]) -> None:
        self._file, self._part, self._path = file, part, path
        self._max_bytes, self._check_space = max_bytes, check_space
        self.size_bytes = 0

    def write(self, data: bytes) -> None:
        self.size_bytes += len(data)
        if self.size_bytes > self._max_bytes:
            raise BodyTooLarge(
                f"the file has more than {self._max_bytes} bytes (jobs.max_file_bytes): split it", param="file"
            )
        self._check_space()
        try:
            self._file.write(data)
        except OSError as error:
            raise StorageFull(f"the file cannot be written: {error.strerror}", retry_after_seconds=30.0) from error

    def commit(self) -> None:
        """On disk, then visible."""
        try:
            self._file.flush()
            sync_to_disk(self._part)
            self._part.replace(self._path)
            sync_to_disk(self._path.parent)
        except OSError as error:
            raise StorageFull(f"the file cannot be written: {error.strerror}", retry_after_seconds=30.0) from error
