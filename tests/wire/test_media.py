"""Servers on-site are given nothing that they would have to fetch: an address is a way out without a permit."""

from typing import Any

import pytest

from appliance.core import Ability, Target, UpstreamCall
from appliance.errors import Unsupported
from appliance.upstream import client

SEES: frozenset[Ability] = frozenset({"chat", "vision", "decisions"})
ENGINE = Target("onsite/m", "onsite", "openai", "unix:/run/s", "m", SEES | frozenset({"token_logprobs"}))
SERVER = Target("site/m", "onsite", "openai", "http://127.0.0.1:1/v1", "m", SEES, provider="site")
HOSTED = Target("p/m", "hosted", "openai", "http://127.0.0.1:1/v1", "m", SEES, provider="p")
PIXEL = "data:image/png;base64,iVBORw0KGgo="
ADDRESS = "https://elsewhere.example/seen?by=secret"


def written(target: Target, part: Any, path: str = "/chat/completions") -> bytes:
    row = {"role": "user", "content": [{"type": "text", "text": ADDRESS, "cache_control": {"type": "ephemeral"}}, part]}
    body = {"input": [row]} if path == "/decisions" else {"messages": [row]}
    return client.write_request(target, UpstreamCall(path, body), stream=False, salt="s").body


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": ADDRESS}},
        {"type": "image_url", "image_url": ADDRESS},
        {"type": "image_url", "image_url": {"url": f" {ADDRESS}"}},
        {"type": "image_url", "image_url": {"url": "HTTP://elsewhere.example"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "video_url", "video_url": {"url": ADDRESS}},
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "of tomorrow", "sources": [{"address": [ADDRESS]}]},
        {"type": "text", "text": "look", "uuid": "u", "image_url": ADDRESS},
    ],
)
@pytest.mark.parametrize("target", [ENGINE, SERVER], ids=["engine", "server"])
def test_addresses_do_not_reach_servers_of_the_site(target: Target, part: Any) -> None:
    with pytest.raises(Unsupported, match="as a data: URL") as caught:
        written(target, part)
    assert caught.value.param == "messages[0].content[1]"
    assert b"elsewhere" in written(HOSTED, {**part, "image_url": ADDRESS})


def test_images_of_decisions_are_held_to_the_same() -> None:
    assert PIXEL.encode() in written(SERVER, {"type": "input_image", "image_url": PIXEL}, "/decisions")
    with pytest.raises(Unsupported):
        written(SERVER, {"type": "input_image", "image_url": ADDRESS}, "/decisions")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}},
        {"type": "file", "file": {"file_data": PIXEL, "filename": "a.png"}},
        {"type": "text", "text": ADDRESS},
    ],
)
def test_what_comes_along_reaches_them(part: Any) -> None:
    for target in (ENGINE, SERVER):
        assert b"messages" in written(target, part)
