"""Model files that lie on this machine or on a mounted share: linked into place, or copied."""

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from appliance.catalog import Variant
from appliance.errors import PullError
from appliance.files import replacing_file
from appliance.node.models.download import (
    CHUNK_BYTES,
    PullContext,
    PullProgress,
    PullReporter,
    explain_disk_error,
    hash_file,
    require_checksum,
)


def obtain_local_file(source: Path, variant: Variant, target: Path, context: PullContext) -> str:
    """Bring a GGUF file, or the only one in a folder; its sha256. Raises PullError."""
    if source.is_dir():
        candidates = sorted(source.glob("*.gguf"))
        if len(candidates) != 1:
            raise PullError(
                f"{source}: one .gguf file was expected there, found {len(candidates)}; name the file itself"
            )
        source = candidates[0]
    if not source.is_file():
        raise PullError(f"{source}: there is no such file; check the path, or mount the share")
    found = link_or_copy_file(source, target, context, source.name)
    if variant.sha256 not in (None, found):
        target.unlink()
    require_checksum(f"checking {source}", variant.sha256, found)
    return found


def obtain_local_folder(source: Path, target: Path, context: PullContext) -> dict[str, str]:
    """Bring a whole model folder; the sha256 by file name. Raises PullError."""
    if not (source / "config.json").is_file():
        raise PullError(f"{source}: is no model folder (it has no config.json); check the path, or mount the share")
    target.mkdir(parents=True, exist_ok=True)
    files = [path for path in sorted(source.iterdir()) if path.is_file()]
    return {path.name: link_or_copy_file(path, target / path.name, context, path.name) for path in files}


def link_or_copy_file(source: Path, target: Path, context: PullContext, what: str) -> str:
    """Link the file where that is possible (same disk, no second copy), else copy it; its sha256."""
    try:
        target.unlink(missing_ok=True)
        try:
            os.link(source.resolve(), target)
        except OSError:
            return _copy_file(source, target, context, what)
        return hash_file(target, PullProgress("verify", what), context.report)
    except OSError as error:
        raise explain_disk_error(error, target, what) from error


def _copy_file(source: Path, target: Path, context: PullContext, what: str) -> str:
    digest, done, total = hashlib.sha256(), 0, source.stat().st_size
    with replacing_file(target) as part, source.open("rb") as incoming, part.open("wb") as output:
        while chunk := incoming.read(CHUNK_BYTES):
            output.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            context.report(PullProgress("copy", what, done, total))
    return digest.hexdigest()


def hash_path(path: Path, report: PullReporter) -> str:
    """The sha256 of a file; of a folder, over its sorted checksums."""
    if path.is_file():
        return hash_file(path, PullProgress("verify", path.name), report)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return hash_checksums(
        {str(file.relative_to(path)): hash_file(file, PullProgress("verify", file.name), report) for file in files}
    )


def hash_checksums(sums: Mapping[str, str]) -> str:
    """One sha256 over the checksums of a folder, by file name."""
    lines = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(sums.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def measure_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def read_mtime_ns(path: Path) -> int:
    """When the file, or the youngest file of the folder, was last written."""
    if path.is_dir():
        return max((file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()), default=0)
    return path.stat().st_mtime_ns


def delete_path(path: Path) -> None:
    """Delete a file or a folder; none is no error."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
