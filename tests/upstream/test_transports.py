"""What the doors open to, what replies mean, and the OpenAI dialect over real sockets."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appliance.core import EgressPermit, ProviderQuirks, Target, TimeLimits, UpstreamCall
from appliance.errors import (
    BackendAuth,
    BackendError,
    BackendGarbage,
    BackendIncapable,
    BackendOverloaded,
    BackendRefused,
    BackendTimeout,
    BackendUnreachable,
    EngineBusy,
    RequestError,
    ResidencyRefused,
    StreamBroken,
)
from appliance.upstream import client
from appliance.upstream.base import Transports, server_root
from appliance.upstream.egress import EgressTransport
from appliance.upstream.error_mapping import error_of_status
from appliance.upstream.local import LocalTransport, NotOnSite
from appliance.upstream.permit_signature import sign_permit
from appliance.upstream.rate_limit_headers import MAX_RETRY_AFTER_SECONDS, parse_retry_after
from appliance.upstream.reply_times import whole_reply_seconds
from appliance.wire.dialect import WireRequest
from tests.router.scene import engine_target, hosted_target
from tests.standin import Mood, StandIn

pytestmark = pytest.mark.anyio

KEY = b"k" * 32
ASK = UpstreamCall("/chat/completions", {"model": "auto", "messages": [{"role": "user", "content": "hi"}], "x_ours": 1})


@pytest.fixture
async def provider() -> AsyncIterator[StandIn]:
    async with StandIn() as made:
        yield made


@pytest.fixture
async def door(provider: StandIn) -> AsyncIterator[EgressTransport]:
    made = EgressTransport({"cloud": provider.address}, {"cloud": "sk-secret"}, KEY)
    yield made
    await made.aclose()


@pytest.fixture
async def local() -> AsyncIterator[LocalTransport]:
    made = LocalTransport()
    yield made
    await made.aclose()


def permit_for(target: Target, key: bytes = KEY) -> EgressPermit:
    return EgressPermit("req-1", target.name, sign_permit(key, "req-1", target))


def letter_of(target: Target, *, stream: bool = False, salt: str = "s", ask: UpstreamCall = ASK) -> WireRequest:
    return client.write_request(target, ask, stream=stream, salt=salt)


def chat_of(**fields: Any) -> UpstreamCall:
    return UpstreamCall("/chat/completions", {"messages": [{"role": "user", "content": "hi"}], **fields})


async def send(door: EgressTransport, target: Target, seconds: float = 5.0, outgoing: UpstreamCall = ASK) -> Any:
    letter = client.write_request(target, outgoing, stream=False, salt="s")
    return await client.send_request(door, letter, permit=permit_for(target), seconds=seconds)


async def open_stream(door: EgressTransport, target: Target, outgoing: UpstreamCall = ASK) -> client.ReplyStream:
    letter = client.write_request(target, outgoing, stream=True, salt="s")
    return await client.open_stream(door, letter, permit=permit_for(target), seconds=10)


async def read_all(stream: client.ReplyStream) -> bytes:
    blocks = []
    while block := await stream.next_block():
        blocks.append(block)
    await stream.aclose()
    return b"".join(blocks)


# --- the egress door


async def test_egress_sends_body_and_key_and_nothing_of_ours(provider: StandIn, door: EgressTransport) -> None:
    reply = await send(door, hosted_target(provider.address))
    assert reply.payload["choices"][0]["message"]["content"] == provider.text
    assert reply.usage.completion_tokens == 5 and 0 < reply.first_byte_seconds <= reply.total_seconds
    (body,) = provider.bodies
    assert body == {**ASK.body, "model": "big"}, "unknown fields travel on; the cache salt is for engines of this node"
    assert provider.headers[0]["authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in repr(door)


async def test_egress_opens_to_a_valid_permit_only(provider: StandIn, door: EgressTransport) -> None:
    target = hosted_target(provider.address)
    other = hosted_target(provider.address, "cloud/other")
    forged = [None, permit_for(other), permit_for(target, b"x" * 32), EgressPermit("req-2", target.name, b"")]
    for permit in forged:
        with pytest.raises(ResidencyRefused):
            await door.open(target, "/chat/completions", b"{}", permit=permit)
    moved = hosted_target("http://127.0.0.1:9/v1")
    with pytest.raises(ResidencyRefused, match="another address"):
        await door.open(moved, "/chat/completions", b"{}", permit=permit_for(moved))
    stranger = hosted_target(provider.address, "nobody/big")
    with pytest.raises(BackendAuth):
        await door.open(stranger, "/chat/completions", b"{}", permit=permit_for(stranger))
    assert provider.calls == 0


async def test_a_redirect_is_never_followed(provider: StandIn, door: EgressTransport) -> None:
    async with StandIn() as elsewhere:
        provider.mood, provider.location = "redirect", elsewhere.address + "/chat/completions"
        with pytest.raises(BackendError, match="redirect"):
            await send(door, hosted_target(provider.address))
        assert elsewhere.calls == 0


async def test_a_proxy_in_the_environment_is_not_asked(
    provider: StandIn, door: EgressTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with StandIn() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.address.removesuffix("/v1"))
        await send(door, hosted_target(provider.address))
        assert (provider.calls, proxy.calls) == (1, 0)


async def test_without_a_provider_there_is_no_door_out(local: LocalTransport) -> None:
    doors = Transports(local)
    with pytest.raises(ResidencyRefused, match="no way off its site"):
        doors.to(hosted_target())
    assert doors.to(engine_target()) is local


# --- the local door


async def test_the_local_door_reaches_an_engine_on_a_unix_socket(tmp_path: Path, local: LocalTransport) -> None:
    async with StandIn(uds=str(tmp_path / "e.sock")) as engine:
        target = engine_target(engine.address)
        reply = await client.send_request(local, letter_of(target, salt="abc"), permit=None, seconds=5)
        assert reply.usage.prompt_tokens > 0
        assert engine.bodies[0]["cache_salt"] == "abc" and engine.bodies[0]["model"] == "tiny"


def test_two_callers_never_share_a_salt() -> None:
    assert client.derive_cache_salt("key-1") != client.derive_cache_salt("key-2")
    assert "key-1" not in client.derive_cache_salt("key-1")


async def test_the_local_door_does_not_lead_to_hosted_targets(local: LocalTransport, provider: StandIn) -> None:
    with pytest.raises(ResidencyRefused):
        await local.open(hosted_target(provider.address), "/chat/completions", b"{}", permit=None)
    assert provider.calls == 0


async def test_an_on_site_server_is_reached_on_loopback_with_its_key(provider: StandIn) -> None:
    door = LocalTransport(secrets={"lan": "sk-lan"})
    target = engine_target(provider.address, "lan/big", provider="lan")
    await client.send_request(door, letter_of(target, salt="s"), permit=None, seconds=5)
    await door.aclose()
    assert provider.headers[0]["authorization"] == "Bearer sk-lan"
    assert "cache_salt" not in provider.bodies[0] and "sk-lan" not in repr(door)


@pytest.mark.parametrize("host", ["192.0.2.1", "[2001:db8::1]", "site.example"])
async def test_an_on_site_name_or_address_that_leads_out_is_not_connected_to(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address is checked when the connection is made, so a name that resolves to the outside is no way out."""

    async def resolve(*_: object, **__: object) -> list[dict[str, Any]]:
        return [{"hostname": host, "host": "198.51.100.7", "port": 80, "family": 2, "proto": 6, "flags": 0}]

    monkeypatch.setattr("aiohttp.resolver.ThreadedResolver.resolve", resolve)
    monkeypatch.setattr("aiohttp.resolver.DefaultResolver.resolve", resolve)
    door = LocalTransport(networks=["10.0.0.0/8"])
    target = engine_target(f"http://{host}/v1", "lan/big", provider="lan")
    with pytest.raises(BackendUnreachable, match="not on this site"):
        await client.send_request(door, letter_of(target, salt="s"), permit=None, seconds=5)
    await door.aclose()


async def test_what_counts_as_this_site() -> None:
    door = LocalTransport(networks=["10.1.0.0/16", "fd00::/8"])
    for inside in ("127.0.0.1", "127.9.9.9", "::1", "10.1.2.3", "fd00::5", "::ffff:10.1.0.1"):
        door.check_address(inside)
    for outside in ("10.2.0.1", "8.8.8.8", "::ffff:8.8.8.8", "fe80::1%eth0", "0.0.0.0"):
        with pytest.raises(NotOnSite):
            door.check_address(outside)


async def test_an_engine_that_is_not_there_is_unreachable(tmp_path: Path, local: LocalTransport) -> None:
    target = engine_target(f"unix:{tmp_path}/none.sock")
    with pytest.raises(BackendUnreachable, match="cannot connect to onsite/tiny") as caught:
        await client.send_request(local, letter_of(target, salt="s"), permit=None, seconds=5)
    assert not caught.value.may_have_cost


# --- replies that are no answers

MOODS: list[tuple[Mood, type[Exception], int, bool]] = [
    ("bad_request", BackendRefused, 400, False),
    ("unauthorized", BackendAuth, 502, True),
    ("rate_limited", BackendOverloaded, 503, True),
    ("overloaded", BackendOverloaded, 503, True),
    ("server_error", BackendError, 502, True),
    ("garbage", BackendGarbage, 502, True),
    ("not_an_object", BackendGarbage, 502, True),
    ("half_body", BackendGarbage, 502, True),
    ("hang_up", BackendGarbage, 502, True),
    ("error_in_200", BackendOverloaded, 503, True),
    ("hang", BackendTimeout, 504, True),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("mood", "kind", "status", "fallback"), MOODS)
async def test_each_misbehaviour_is_one_error_of_ours(
    provider: StandIn,
    door: EgressTransport,
    mood: Mood,
    kind: type[Exception],
    status: int,
    fallback: bool,
    stream: bool,
) -> None:
    if stream and mood == "half_body":
        pytest.skip("a stream has no length; see half_stream")
    provider.mood = mood
    seconds = 0.3 if mood == "hang" else 5.0
    target = hosted_target(provider.address, limits=TimeLimits(connect_seconds=2, first_byte_seconds=seconds))
    with pytest.raises(kind) as caught:
        if stream:
            await open_stream(door, target)
        else:
            await send(door, target, seconds=seconds)
    error = caught.value
    assert isinstance(error, BackendError)
    assert (error.status, error.fallback) == (status, fallback)
    assert "sk-" not in error.message, "upstream messages about keys quote them"


async def test_a_refusal_keeps_the_targets_words_and_code(provider: StandIn, door: EgressTransport) -> None:
    provider.mood = "bad_request"
    with pytest.raises(BackendRefused) as caught:
        await send(door, hosted_target(provider.address))
    assert caught.value.message == "cloud/big: temperature must be at most 2"
    assert caught.value.code == "invalid_value"


STATUSES: list[tuple[type[Exception], list[int]]] = [
    (BackendRefused, [400, 422, 501]),
    (BackendIncapable, [404, 405, 413]),
    (BackendAuth, [401, 402, 403]),
    (BackendTimeout, [408, 504]),
    (BackendOverloaded, [409, 429, 503, 529]),
    (BackendError, [302, 500, 502, 520]),
]


@pytest.mark.parametrize(("status", "kind"), [(status, kind) for kind, group in STATUSES for status in group])
async def test_pitfall_13_only_passing_troubles_may_be_tried_elsewhere(status: int, kind: type[Exception]) -> None:
    error = error_of_status(hosted_target(), status, b"", {}, 0.0)
    assert type(error) is kind
    assert error.fallback is (kind is not BackendRefused)


async def test_an_engines_own_full_queue_is_busy_with_a_hint() -> None:
    error = error_of_status(engine_target(), 503, b'{"error": {"message": "queue full"}}', {"retry-after": "3"}, 0.0)
    assert isinstance(error, EngineBusy) and error.retry_after_seconds == 3.0 and "queue full" in error.message


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"null", b'"text"', b'{"error": null}', b'{"error": "words"}', b"\xff\xfe"]
)
async def test_any_error_body_is_understood_or_ignored(raw: bytes) -> None:
    assert error_of_status(hosted_target(), 500, raw, {}, 0.0).message


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "31536000"}, MAX_RETRY_AFTER_SECONDS),
        ({"retry-after": "-5"}, 0.0),
        ({"retry-after": "inf"}, MAX_RETRY_AFTER_SECONDS),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 40.0),
        ({"retry-after": "Thu, 01 Jan 2970 00:00:00 GMT"}, MAX_RETRY_AFTER_SECONDS),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
    ],
)
async def test_retry_after_is_read_and_bounded(headers: dict[str, str], seconds: float | None) -> None:
    assert parse_retry_after(headers, 60.0) == seconds


async def test_a_body_that_cannot_be_json_is_the_callers_mistake(provider: StandIn, door: EgressTransport) -> None:
    for bad in ("\ud800", 2**80):
        with pytest.raises(RequestError):
            await send(
                door, hosted_target(provider.address), outgoing=UpstreamCall("/chat/completions", {"prompt": bad})
            )
    assert provider.calls == 0


# --- time limits


async def test_pitfall_3_silence_before_the_headers_has_its_own_limit(provider: StandIn, door: EgressTransport) -> None:
    provider.mood = "hang"
    target = hosted_target(provider.address, limits=TimeLimits(first_byte_seconds=0.05, between_tokens_seconds=60))
    with pytest.raises(BackendTimeout, match="sent nothing for"):
        await open_stream(door, target)
    await asyncio.wait_for(provider.caller_left.wait(), 5)


async def test_pitfall_3_silence_between_tokens_has_its_own_limit(provider: StandIn, door: EgressTransport) -> None:
    provider.mood = "silent_stream"
    target = hosted_target(provider.address, limits=TimeLimits(first_byte_seconds=60, between_tokens_seconds=0.05))
    stream = await open_stream(door, target)
    with pytest.raises(StreamBroken, match="fell silent"):
        await read_all(stream)
    await stream.aclose()
    await asyncio.wait_for(provider.caller_left.wait(), 5)


async def test_pitfall_3_a_stream_has_a_total_limit_too(provider: StandIn, door: EgressTransport) -> None:
    provider.mood = "silent_stream"
    target = hosted_target(provider.address)
    stream = await client.open_stream(door, letter_of(target, stream=True), permit=permit_for(target), seconds=0.1)
    with pytest.raises(StreamBroken, match="the time for this request was over"):
        await read_all(stream)
    await stream.aclose()


def test_pitfall_3_a_whole_reply_may_be_silent_for_as_long_as_it_is_written() -> None:
    limits = TimeLimits(first_byte_seconds=10, total_seconds=600)
    assert whole_reply_seconds(letter_of(hosted_target(limits=limits), ask=chat_of(max_tokens=2000)), 16) == 110
    assert whole_reply_seconds(letter_of(hosted_target(limits=limits), ask=chat_of(max_tokens=10**6)), 16) == 600
    assert whole_reply_seconds(letter_of(engine_target(limits=limits)), 1) == 600, "its progress is watched elsewhere"


@pytest.mark.parametrize("dialect", ["openai", "anthropic", "gemini"])
def test_a_whole_reply_without_a_limit_of_its_caller_gets_the_time_of_the_limit_that_is_sent(dialect: Any) -> None:
    limits = TimeLimits(first_byte_seconds=60, total_seconds=600)
    target = hosted_target(dialect=dialect, limits=limits)
    assert whole_reply_seconds(letter_of(target, ask=chat_of()), 256) == 60 + 8192 / 20
    small = replace(target, wire=ProviderQuirks(max_output_tokens=1000))
    assert whole_reply_seconds(letter_of(small, ask=chat_of()), 256) == 110


def test_a_reply_in_which_nothing_is_written_has_the_time_of_what_is_expected() -> None:
    target = hosted_target(limits=TimeLimits(first_byte_seconds=10))
    letter = client.write_request(target, UpstreamCall("/decisions", {"questions": []}), stream=False, salt="s")
    assert whole_reply_seconds(letter, 40) == 12


async def test_a_path_beside_the_version_is_built_from_the_servers_root(local: LocalTransport, tmp_path: Path) -> None:
    async with StandIn(uds=str(tmp_path / "e.sock")) as engine:
        at_root = await local.open(engine_target(engine.address), "/counts", b"{}", permit=None, at_root=True)
        below = await local.open(engine_target(engine.address), "/counts", b"{}", permit=None)
        await asyncio.gather(at_root.aread(), below.aread())
        assert (at_root.status_code, below.status_code) == (405, 404), "the stand-in has GET /counts and no /v1/counts"
    assert server_root("http://engine/v1") == "http://engine"
    assert server_root("https://host/models/v1/") == "https://host/models"


async def test_nothing_beside_a_hosted_targets_address_is_asked(provider: StandIn, door: EgressTransport) -> None:
    target = hosted_target(provider.address)
    with pytest.raises(ResidencyRefused, match="nothing beside its address"):
        await door.open(target, "/tokenize", b"{}", permit=permit_for(target), at_root=True)
    assert provider.calls == 0


# --- streams


async def test_a_stream_passes_whole_and_tells_its_usage(provider: StandIn, door: EgressTransport) -> None:
    stream = await open_stream(door, hosted_target(provider.address))
    got = await read_all(stream)
    assert got.endswith(b"data: [DONE]\n\n") and b'"usage":{' not in got and b"forty" in got
    assert provider.bodies[0]["stream_options"] == {"include_usage": True}
    assert stream.usage is not None and stream.usage.completion_tokens == 5 and stream.is_whole


async def test_usage_is_passed_on_where_it_was_asked_for(provider: StandIn, door: EgressTransport) -> None:
    body = {**ASK.body, "stream_options": {"include_usage": True, "other": 1}}
    got = await read_all(
        await open_stream(door, hosted_target(provider.address), UpstreamCall("/chat/completions", body))
    )
    assert b'"usage":{' in got
    assert provider.bodies[0]["stream_options"] == {"include_usage": True, "other": 1}


async def test_a_stream_without_done_but_with_a_reason_is_ended_properly(
    provider: StandIn, door: EgressTransport
) -> None:
    provider.mood = "stream_without_done"
    assert (await read_all(await open_stream(door, hosted_target(provider.address)))).endswith(b"data: [DONE]\n\n")


async def test_pitfall_1_a_truncated_stream_is_an_error_and_never_a_clean_end(
    provider: StandIn, door: EgressTransport
) -> None:
    provider.seconds_per_token = 0.005
    breaks: list[tuple[Mood, str]] = [("half_stream", "in the middle"), ("error_event_later", "out of memory")]
    for mood, words in breaks:
        provider.moods = [mood]
        stream = await open_stream(door, hosted_target(provider.address))
        got = b""
        with pytest.raises(StreamBroken, match=words):
            while block := await stream.next_block():
                got += block
        assert got and b"[DONE]" not in got and b"error" not in got
        await stream.aclose()


async def test_pitfall_1_an_error_as_the_first_event_is_a_failed_attempt(
    provider: StandIn, door: EgressTransport
) -> None:
    provider.mood = "error_event_first"
    with pytest.raises(BackendError, match="the model is gone") as caught:
        await open_stream(door, hosted_target(provider.address))
    assert caught.value.fallback


async def test_closing_a_stream_cancels_the_work_at_the_target(provider: StandIn, door: EgressTransport) -> None:
    provider.mood = "silent_stream"
    stream = await open_stream(door, hosted_target(provider.address))
    assert await stream.next_block()
    await stream.aclose()
    await stream.aclose()
    await asyncio.wait_for(provider.caller_left.wait(), 5)
    assert await stream.next_block() == b"" and not stream.is_whole


async def test_an_engine_that_dies_in_mid_stream_breaks_it(tmp_path: Path, local: LocalTransport) -> None:
    async with StandIn(uds=str(tmp_path / "e.sock"), mood="silent_stream") as engine:
        target = engine_target(engine.address)
        stream = await client.open_stream(local, letter_of(target, stream=True), permit=None, seconds=10)
        assert await stream.next_block()
        engine.mood = "half_stream"
        reading = asyncio.create_task(read_all(stream))
        await engine.stop()
        with pytest.raises(StreamBroken):
            await reading
        await stream.aclose()


async def test_connections_are_used_again(provider: StandIn, door: EgressTransport) -> None:
    target = hosted_target(provider.address)
    for _ in range(3):
        await send(door, target)
        await read_all(await open_stream(door, target))
    session = door._transport.client
    connections = [made for pool in session.connector._conns.values() for made in pool]
    assert len(connections) == 1
