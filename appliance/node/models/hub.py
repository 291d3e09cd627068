"""Model files on a hub. huggingface_hub finds them; `download` brings their bytes.

The library knows addresses, revisions, tokens, offline mode and the hub's errors. Its own transfer (2.4) removes what
it has when it fails, so that the next pull begins anew, and it checks the size alone. `download` keeps partial files
between pulls and proves each file by its checksum, which matters for files of 50 GB.
"""

import re
from pathlib import Path

import huggingface_hub  # its parts that are slow to import are loaded when first used

from appliance.catalog import HubSource, Variant
from appliance.errors import PullError
from appliance.node.models.download import (
    Download,
    PullContext,
    PullProgress,
    SourceRefused,
    download_file,
    hash_file,
    require_checksum,
    require_space,
    resolve_inside,
)

HUB_FOLDER_FILES = re.compile(r"[^/]+\.(safetensors|json|txt|model|jinja)")
"""What an engine needs of a repository: weights, configuration, tokenizer. Not other formats of the same weights."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def obtain_hub_file(source: HubSource, file: str, variant: Variant, target: Path, context: PullContext) -> str:
    """Bring one file of a repository; its sha256. Raises PullError, SourceRefused for a gated model without access."""
    name = f"{source.repository}/{file}"
    context.report(PullProgress("resolve", name))
    try:
        url = huggingface_hub.hf_hub_url(source.repository, file, revision=source.revision)
        metadata = huggingface_hub.get_hf_file_metadata(url)
    except _list_hub_errors() as error:
        raise _explain_hub_error(name, error) from error
    recorded = metadata.etag if metadata.etag and _SHA256.fullmatch(metadata.etag) else None
    if variant.sha256 and recorded:
        require_checksum(f"finding {name} at {source.revision}", variant.sha256, recorded)
    headers = _build_hub_headers()
    return download_file(
        Download(url, target, name, variant.sha256 or recorded, metadata.size, headers),
        context.report,
        client=context.client,
    )


def obtain_hub_folder(source: HubSource, target: Path, context: PullContext) -> dict[str, str]:
    """Bring the files of a repository that an engine needs; the sha256 by file name. Raises PullError."""
    context.report(PullProgress("resolve", source.repository))
    try:
        info = huggingface_hub.HfApi().model_info(source.repository, revision=source.revision, files_metadata=True)
    except _list_hub_errors() as error:
        raise _explain_hub_error(source.repository, error) from error
    wanted = source.files or tuple(
        sibling.rfilename for sibling in info.siblings or () if HUB_FOLDER_FILES.fullmatch(sibling.rfilename)
    )
    records = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    # The catalogue's size may be computed; the hub knows it, before anything has come.
    there = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    total = sum(records[file].size or 0 for file in wanted if file in records)
    require_space(context.folder, max(0, total - there), source.repository)
    headers = _build_hub_headers()
    sums = {}
    for file in wanted:
        record = records.get(file)
        if record is None:
            raise PullError(f"finding {source.repository}/{file}: the repository has no such file at {source.revision}")
        url = huggingface_hub.hf_hub_url(source.repository, file, revision=info.sha or source.revision)
        sha256 = record.lfs.sha256 if record.lfs else None
        download = Download(
            url, resolve_inside(target, file), f"{source.repository}/{file}", sha256, record.size, headers
        )
        sums[file] = _keep_or_download(download, context)
    return sums


def _keep_or_download(download: Download, context: PullContext) -> str:
    """A file of a folder that an earlier, interrupted pull finished is not fetched again, if it can be proven."""
    if download.sha256 and download.target.exists():
        shown = PullProgress("verify", download.what)
        if hash_file(download.target, shown, context.report) == download.sha256:
            return download.sha256
    return download_file(download, context.report, client=context.client)


def _list_hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's library raises. Its own base class carries the one of the HTTP library that it is built on."""
    from huggingface_hub import errors  # noqa: PLC0415 - brings a second HTTP library, 0.4 s that only failures need

    return (ValueError, *errors.HfHubHTTPError.__bases__)


def _build_hub_headers() -> dict[str, str]:
    token = huggingface_hub.get_token()
    return {"authorization": f"Bearer {token}"} if token else {}


def _explain_hub_error(name: str, error: Exception) -> PullError:
    from huggingface_hub import errors  # noqa: PLC0415 - brings a second HTTP library, 0.4 s that only failures need

    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, errors.GatedRepoError):
        return SourceRefused(
            f"finding {name}: its publisher wants its licence accepted first; do that on the hub, then set HF_TOKEN"
        )
    if isinstance(error, (errors.RepositoryNotFoundError, errors.RemoteEntryNotFoundError)):
        return PullError(
            f"finding {name}: the hub does not have it, or only for who is logged in (HF_TOKEN): {first_line}"
        )
    return PullError(f"finding {name}: the hub cannot be reached: {first_line}; check the network, or set HF_ENDPOINT")
