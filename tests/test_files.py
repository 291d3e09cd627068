import os
from pathlib import Path
from typing import Any

import pytest

from appliance.errors import StorageFull
from appliance.files import OWNER_ONLY, raising_storage_full, replace_file, replacing_file


def test_a_file_is_replaced_whole_and_leaves_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    replace_file(path, "old")
    replace_file(path, b"new \xff")
    assert path.read_bytes() == b"new \xff"
    assert os.listdir(tmp_path) == ["kept.json"]


def test_text_is_written_as_utf8(tmp_path: Path) -> None:
    replace_file(tmp_path / "kept.txt", "Zürich ✓")
    assert (tmp_path / "kept.txt").read_bytes() == "Zürich ✓".encode()


def test_content_and_name_are_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    sync, rename = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        steps.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")).rsplit(".", 1)[-1])
        sync(descriptor)

    def replace(path: Path, target: Path) -> Path:
        steps.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    replace_file(tmp_path / "kept.json", "new")
    assert steps == ["sync part", "rename", f"sync {tmp_path.name}"]


def test_what_fails_leaves_the_old_content_and_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kept.json"
    replace_file(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["kept.json"]


def test_a_block_that_raises_leaves_the_old_content_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    replace_file(path, "old")
    with pytest.raises(ValueError, match="half"), replacing_file(path) as draft:
        draft.write_text("half")
        raise ValueError("half")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["weights.bin"]


def test_a_file_for_its_owner_alone_is_never_open_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        modes.append(os.fstat(descriptor).st_mode & 0o777)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    replace_file(tmp_path / "secret.json", "mine", mode=OWNER_ONLY)
    assert modes[0] == 0o600
    assert (tmp_path / "secret.json").stat().st_mode & 0o777 == 0o600


def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    replace_file(path, "old")
    path.chmod(0o640)
    replace_file(path, "new")
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("number", [28, 122])
def test_a_full_disk_and_a_used_up_quota_become_storage_full(number: int) -> None:
    with pytest.raises(StorageFull, match="free space") as caught, raising_storage_full("full: free space"):
        raise OSError(number, "no room")
    assert caught.value.retry_after_seconds == 30


def test_other_errors_of_the_disk_stay_what_they_are() -> None:
    def fail() -> Any:
        raise PermissionError(13, "Permission denied")

    with pytest.raises(PermissionError), raising_storage_full("full: free space"):
        fail()
