"""The application without a network: errors, keys, explanations, health."""

import hashlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import pytest

from appliance.api.auth import Authenticator
from appliance.config import KeySettings
from appliance.core import HealthWarning, Snapshot
from appliance.errors import Busy, ConfigError, EngineBusy, Unauthorized, Unsupported
from appliance.wire.json_body import MAX_DEPTH
from tests.api.stand_ins import NOW, SMALL, StandInLedger, StandInPipeline, make_app, snapshot

pytestmark = pytest.mark.anyio

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
REPLY = {"id": "c", "object": "chat.completion", "choices": [{"index": 0, "message": {"content": "Hi"}}], "x_odd": 1}
HEADERS = (
    "x-request-id",
    "x-appliance-decision",
    "x-appliance-target",
    "x-appliance-location",
    "x-appliance-route",
    "x-appliance-reason",
    "x-appliance-policy",
    "x-appliance-cost-usd",
)


def client(app: Any, **more: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://node", **more)


@pytest.fixture
def pipeline() -> StandInPipeline:
    return StandInPipeline(reply=lambda outgoing: REPLY)


@pytest.fixture
async def http(pipeline: StandInPipeline) -> AsyncIterator[httpx.AsyncClient]:
    async with client(make_app(pipeline)) as opened:
        yield opened


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The OpenAI error object, its shape checked."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


async def test_an_answer_is_the_targets_payload_with_all_headers(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 200
    assert response.json() == REPLY
    assert all(response.headers[name] for name in HEADERS)
    assert response.headers["x-appliance-target"] == SMALL.name


@pytest.mark.parametrize(("given", "kept"), [("abc-1.2_3", True), ("a b", False), ("x" * 129, False), ("", False)])
async def test_a_sane_request_id_of_the_caller_is_kept(
    http: httpx.AsyncClient, pipeline: StandInPipeline, given: str, kept: bool
) -> None:
    response = await http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": given})
    assert (response.headers["x-request-id"] == given) is kept
    assert pipeline.requests[0].id == response.headers["x-request-id"]


BAD_BODIES: list[tuple[bytes, str]] = [
    (b"", "empty"),
    (b"  \n", "empty"),
    (b"{", "line 1 column"),
    (b'{"messages": [}', "column 15"),
    (b'{"messages": NaN}', "not valid JSON"),
    (b"\xff\xfe{}", "not valid JSON"),
    (b"[]", "a list"),
    (b'"hello"', "a string"),
    (b"null", "null"),
    (b"17", "a number"),
    (b'{"messages": [{"role": "user", "content": "a\\u0000b"}]}', "messages[0].content contains a NUL"),
    (b'{"messages": [{"role": "user", "content": "a\\ud800b"}]}', "messages[0].content contains a lone surrogate"),
    (b'{"a\\u0000": 1}', "a key contains a NUL"),
    (b'{"a": ' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), "levels deep"),
    (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "depth limit"),
]


@pytest.mark.parametrize(("body", "words"), BAD_BODIES)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/decisions", "/v1/extract", "/v1/explain"])
async def test_a_bad_body_is_refused_with_what_is_wrong_and_where(
    http: httpx.AsyncClient, path: str, body: bytes, words: str
) -> None:
    response = await http.post(path, content=body)
    assert response.status_code == 400
    error = error_of(response)
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


async def test_a_null_character_written_as_text_is_no_null_character(
    http: httpx.AsyncClient, pipeline: StandInPipeline
) -> None:
    content = b'{"messages": [{"role": "user", "content": "\\\\u0000"}]}'
    assert (await http.post("/v1/chat/completions", content=content)).status_code == 200
    assert pipeline.requests[0].text == "\\u0000"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {**CHAT, "n": 0}, "n"),
        ("/v1/chat/completions", {**CHAT, "temperature": "hot"}, "temperature"),
        (
            "/v1/chat/completions",
            {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
            "response_format.json_schema.schema",
        ),
        ("/v1/completions", {}, "prompt"),
        ("/v1/decisions", {"input": "x", "questions": []}, "questions"),
        (
            "/v1/decisions",
            {
                "input": "x",
                "questions": [
                    {"type": "choice", "instructions": "?", "choices": [{"value": str(n)} for n in range(256)]}
                ],
            },
            "questions[0].choices",
        ),
        ("/v1/systemone", {"state": "x", "questions": {}}, "questions"),
        ("/v1/decisions/batch", {"inputs": [], "questions": []}, "questions"),
        ("/v1/extract", {"text": "x", "schema": {"type": "objct"}}, "schema"),
        ("/v1/explain", {"endpoint": "poetry"}, "endpoint"),
    ],
)
async def test_a_wrong_field_is_named_in_the_error(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], param: str
) -> None:
    response = await http.post(path, json=body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


async def test_a_content_type_does_not_matter_but_a_compressed_body_does(http: httpx.AsyncClient) -> None:
    plain = await http.post("/v1/chat/completions", json=CHAT, headers={"content-type": "text/plain"})
    assert plain.status_code == 200
    packed = await http.post("/v1/chat/completions", json=CHAT, headers={"content-encoding": "gzip"})
    assert packed.status_code == 415
    assert "uncompressed" in error_of(packed)["message"]


async def test_unknown_paths_and_methods_are_refused_in_openais_shape(http: httpx.AsyncClient) -> None:
    missing = await http.post("/v1/poems", json={})
    assert (missing.status_code, error_of(missing)["code"]) == (404, "not_found")
    wrong = await http.get("/v1/chat/completions")
    assert wrong.status_code == 405
    assert "POST" in error_of(wrong)["message"] and wrong.headers["allow"] == "POST"


@pytest.mark.parametrize("name", ["%2e", "%2e%2e", "%2e%2e%2e"])
async def test_a_classifiers_name_leads_nowhere_else(http: httpx.AsyncClient, name: str) -> None:
    found = await http.get(f"/v1/classifiers/{name}/training")
    assert found.status_code == 404
    assert "there is no classifier" in found.json()["error"]["message"]


async def test_an_error_carries_its_decisions_headers_and_when_to_come_back(
    http: httpx.AsyncClient, pipeline: StandInPipeline
) -> None:
    pipeline.error = Busy("full for now", retry_after_seconds=1.2)
    pipeline.error.headers = {"x-appliance-decision": "dec_9", "x-appliance-target": "none"}
    response = await http.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"
    assert response.headers["x-appliance-decision"] == "dec_9"
    assert error_of(response) == {
        "message": "full for now",
        "type": "rate_limit_error",
        "param": None,
        "code": "capacity_exceeded",
    }


@pytest.mark.parametrize("error", [RuntimeError("secret path /etc"), ConfigError("secret", file="/etc/x", line=3)])
async def test_a_defect_is_told_with_the_request_id_and_nothing_else(
    http: httpx.AsyncClient, pipeline: StandInPipeline, error: Exception
) -> None:
    pipeline.error = error
    response = await http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "mine"})
    assert response.status_code == 500
    told = error_of(response)
    assert "mine" in told["message"] and "secret" not in told["message"]
    assert response.headers["x-request-id"] == "mine"


async def test_a_reply_nested_beyond_writing_is_a_backends_fault(
    http: httpx.AsyncClient, pipeline: StandInPipeline
) -> None:
    deep: Any = {}
    for _ in range(400):
        deep = {"a": deep}
    pipeline.reply = lambda outgoing: {**REPLY, "deep": deep}
    response = await http.post("/v1/chat/completions", json=CHAT)
    assert (response.status_code, error_of(response)["code"]) == (502, "backend_garbage")
    assert response.headers["x-appliance-decision"]
    assert pipeline.answers[0].closed.is_set()


async def test_headers_that_bind_and_tag_a_request_reach_the_pipeline(
    http: httpx.AsyncClient, pipeline: StandInPipeline
) -> None:
    bound = {"x-appliance-residency": "onsite", "x-appliance-tag": "nightly"}
    await http.post("/v1/chat/completions", json=CHAT, headers=bound)
    assert (str(pipeline.requests[0].residency), pipeline.requests[0].tag) == ("onsite", "nightly")
    wrong = await http.post("/v1/chat/completions", json=CHAT, headers={"x-appliance-residency": "inhouse"})
    assert wrong.status_code == 400 and "inhouse" in error_of(wrong)["message"]


def key(text: str, name: str, *scopes: Any) -> KeySettings:
    return KeySettings(name=name, sha256=hashlib.sha256(text.encode()).hexdigest(), scopes=scopes or ("client",))


KEYS = (key("sk-client", "shop"), key("sk-admin", "ops", "client", "admin"), key("sk-scrape", "scraper", "admin"))


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 401, "invalid_api_key"),
        ({"authorization": "Bearer sk-wrong"}, 401, "invalid_api_key"),
        ({"authorization": "Basic sk-client"}, 401, "invalid_api_key"),
        ({"authorization": "Bearer "}, 401, "invalid_api_key"),
        ({"authorization": "Bearer sk-client"}, 200, None),
        ({"authorization": "bearer sk-client"}, 200, None),
        ({"x-api-key": "sk-client"}, 200, None),
        ({"authorization": "Bearer sk-scrape"}, 403, "forbidden"),
    ],
)
async def test_where_keys_are_configured_one_is_needed(
    pipeline: StandInPipeline, headers: dict[str, str], status: int, code: str | None
) -> None:
    async with client(make_app(pipeline, keys=KEYS), headers=headers) as http:
        response = await http.post("/v1/chat/completions", json=CHAT)
        assert response.status_code == status
        if code is not None:
            assert error_of(response)["code"] == code
            assert "sk-" not in response.text
            assert not pipeline.requests
        else:
            assert pipeline.requests[0].caller.name == "shop"


async def test_a_node_whose_last_key_is_gone_is_closed_and_not_open_to_everybody() -> None:
    auth = Authenticator(KEYS, host="127.0.0.1")
    auth.replace_keys(())
    for headers in ({}, {"authorization": "Bearer sk-client"}):
        with pytest.raises(Unauthorized):
            auth.authenticate(headers)


async def test_an_unknown_key_is_refused_before_the_body_is_read(pipeline: StandInPipeline) -> None:
    async with client(make_app(pipeline, keys=KEYS)) as http:
        assert (await http.post("/v1/chat/completions", content=b"{")).status_code == 401


async def test_an_open_node_without_keys_answers_nobody_and_says_what_to_do(pipeline: StandInPipeline) -> None:
    async with client(make_app(pipeline, host="0.0.0.0")) as http:
        response = await http.post("/v1/chat/completions", json=CHAT)
        assert response.status_code == 401
        assert "appliance keys create" in error_of(response)["message"]


async def test_a_web_page_cannot_use_a_node_without_keys(pipeline: StandInPipeline) -> None:
    async with client(make_app(pipeline)) as http:
        foreign = await http.post("/v1/chat/completions", json=CHAT, headers={"origin": "https://evil.example"})
        assert foreign.status_code == 403
        own = await http.post("/v1/chat/completions", json=CHAT, headers={"origin": "http://localhost:3000"})
        assert own.status_code == 200


async def test_metrics_need_the_scope_admin(pipeline: StandInPipeline) -> None:
    async with client(make_app(pipeline, keys=KEYS)) as http:
        for text, status in (("sk-client", 403), ("sk-scrape", 200)):
            response = await http.get("/metrics", headers={"authorization": f"Bearer {text}"})
            assert response.status_code == status
        assert "appliance_engine_ready" in response.text


async def test_models_are_auto_and_what_the_caller_may_use(http: httpx.AsyncClient) -> None:
    listed = (await http.get("/v1/models")).json()
    assert [row["id"] for row in listed["data"]] == ["auto", SMALL.name]
    one = (await http.get(f"/v1/models/{SMALL.name}")).json()
    assert (one["location"], one["context_tokens"]) == ("onsite", 2048)
    assert one == listed["data"][1]
    missing = await http.get("/v1/models/gpt-99")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")


async def test_a_dry_run_explains_and_calls_nothing(http: httpx.AsyncClient, pipeline: StandInPipeline) -> None:
    story = (await http.post("/v1/explain", json=CHAT)).json()
    assert story["attempts"] == [{"target": SMALL.name, "location": "onsite", "reason": "first choice"}]
    assert (story["dry_run"], story["policy_version"], story["residency"]) == (True, "sha256:0", "any")
    assert not pipeline.sent


@pytest.mark.parametrize(
    ("endpoint", "body", "seen"),
    [
        ("/v1/chat/completions", CHAT, "chat"),
        ("completions", {"prompt": "x"}, "completions"),
        (
            "decisions/batch",
            {"inputs": ["x"], "questions": [{"type": "predicate", "instructions": "?"}]},
            "decisions",
        ),
        ("/v1/extract", {"text": "x", "schema": {"type": "object"}}, "extract"),
    ],
)
async def test_a_dry_run_is_for_any_endpoint(
    http: httpx.AsyncClient, pipeline: StandInPipeline, endpoint: str, body: Mapping[str, Any], seen: str
) -> None:
    response = await http.post("/v1/explain", json={"endpoint": endpoint, **body})
    assert response.status_code == 200
    assert response.json()["endpoint"] == seen
    assert pipeline.requests[0].body == body


async def test_a_decision_is_told_to_its_caller_and_to_admins_alone(pipeline: StandInPipeline) -> None:
    ledger = StandInLedger({"dec_1": {"id": "dec_1", "key_id": "shop"}, "dec_2": {"id": "dec_2", "key_id": "ops"}})
    async with client(make_app(pipeline, keys=KEYS, ledger=ledger)) as http:
        statuses = {
            (text, name): (
                await http.get(f"/v1/explain/{name}", headers={"authorization": f"Bearer {text}"})
            ).status_code
            for text in ("sk-client", "sk-admin")
            for name in ("dec_1", "dec_2", "dec_3", "dec%27--")
        }
    assert statuses == {
        ("sk-client", "dec_1"): 200,
        ("sk-client", "dec_2"): 404,
        ("sk-client", "dec_3"): 404,
        ("sk-client", "dec%27--"): 404,
        ("sk-admin", "dec_1"): 200,
        ("sk-admin", "dec_2"): 200,
        ("sk-admin", "dec_3"): 404,
        ("sk-admin", "dec%27--"): 404,
    }


async def test_health_says_what_needs_a_person_to_those_with_a_key(pipeline: StandInPipeline) -> None:
    warned = snapshot(warnings=[HealthWarning("clock_skew", "set the clock")])
    app = make_app(pipeline, keys=KEYS, ledger=StandInLedger(reason="disk full"), shown=warned)
    async with client(app) as http:
        stranger = await http.get("/healthz")
        assert (stranger.status_code, stranger.json()) == (200, {"status": "degraded"})
        known = (await http.get("/healthz", headers={"x-api-key": "sk-client"})).json()
        assert known["warnings"] == [{"code": "clock_skew", "text": "set the clock"}]
        assert known["ledger"]["reason"] == "disk full"


@pytest.mark.parametrize(
    ("shown", "status", "reason"),
    [
        (snapshot(), 200, ""),
        (snapshot(seen=NOW - 60), 503, "last seen 60.0 s ago"),
        (Snapshot(NOW, (SMALL,)), 503, "not been seen yet"),
    ],
)
async def test_readiness_is_whether_some_target_can_answer(
    pipeline: StandInPipeline, shown: Snapshot, status: int, reason: str
) -> None:
    async with client(make_app(pipeline, shown=shown)) as http:
        response = await http.get("/readyz")
        assert response.status_code == status
        assert reason in response.json()["targets"][0]["reason"]


async def test_a_node_without_targets_is_not_ready(pipeline: StandInPipeline) -> None:
    async with client(make_app(pipeline, shown=Snapshot(NOW))) as http:
        assert (await http.get("/readyz")).status_code == 503


TRUE = {"type": "predicate", "name": "urgent", "instructions": "Is it urgent?"}


def scores(outgoing: Any) -> dict[str, Any]:
    result = {"labels": [{"label": "yes", "logprob": -0.1}, {"label": "no", "logprob": -3.0}], "label_mass": 0.9}
    return {"results": [result] * len(outgoing.body["items"])}


async def test_a_batch_answers_every_input_in_order(http: httpx.AsyncClient, pipeline: StandInPipeline) -> None:
    pipeline.reply = scores
    response = await http.post("/v1/decisions/batch", json={"inputs": ["a"] * 70, "questions": [TRUE]})
    body = response.json()
    assert [row["index"] for row in body["results"]] == list(range(70))
    assert len(pipeline.sent) == 3
    assert body["usage"]["input_tokens"] == 30
    assert all(response.headers[name] for name in HEADERS)


async def test_a_batch_of_which_nothing_was_answered_is_an_error_and_not_a_list_of_them(
    http: httpx.AsyncClient, pipeline: StandInPipeline
) -> None:
    pipeline.error = EngineBusy("the queue is full", retry_after_seconds=3)
    response = await http.post("/v1/decisions/batch", json={"inputs": ["a"], "questions": [TRUE]})
    assert (response.status_code, response.headers["retry-after"]) == (503, "3")
    assert response.headers["x-appliance-decision"] == "dec_1"


async def test_extract_answers_one_text_with_one_object_and_several_with_rows(
    http: httpx.AsyncClient, pipeline: StandInPipeline
) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}}
    pipeline.reply = lambda outgoing: {"choices": [{"message": {"content": '{"age": 7}'}}]}
    one = (await http.post("/v1/extract", json={"text": "seven", "schema": schema})).json()
    assert (one["object"], one["confidence"]) == ({"age": 7}, None)
    several = (await http.post("/v1/extract", json={"texts": ["seven"], "schema": schema})).json()
    assert several["results"] == [{"index": 0, "object": {"age": 7}, "confidence": None}]


async def test_a_large_schema_is_checked_away_from_the_loop(http: httpx.AsyncClient) -> None:
    properties = {f"field_{n}": {"type": "string", "description": "what it is"} for n in range(300)}
    body = {"text": "x", "schema": {"type": "object", "properties": properties, "required": ["field_0"]}}
    response = await http.post("/v1/extract", json=body)
    assert response.status_code in (200, 502)


async def test_a_reload_needs_an_admin_key_and_says_what_is_in_force(pipeline: StandInPipeline) -> None:
    def key(name: str, *scopes: str) -> KeySettings:
        digest = hashlib.sha256(f"sk-{name}".encode()).hexdigest()
        return KeySettings.model_validate({"name": name, "sha256": digest, "scopes": scopes})

    app = make_app(pipeline, keys=[key("client", "client"), key("boss", "client", "admin")])
    async with client(app) as http:
        assert (await http.post("/admin/reload")).status_code == 401
        assert (await http.post("/admin/reload", headers={"x-api-key": "sk-client"})).status_code == 403
        response = await http.post("/admin/reload", headers={"x-api-key": "sk-boss"})
        assert response.json() == {"policy_version": "sha256:2", "needs_restart": []}


async def test_a_reload_that_finds_a_mistake_says_where_and_that_nothing_changed(pipeline: StandInPipeline) -> None:
    mistake = ConfigError("greater than 0", file="policy.toml", line=7, field="defaults.max_attempts")
    async with client(make_app(pipeline, mistake=mistake)) as http:
        response = await http.post("/admin/reload")
    assert response.status_code == 422
    message = error_of(response)["message"]
    assert "nothing was changed" in message
    assert "policy.toml:7: defaults.max_attempts" in message


async def test_embeddings_come_from_a_model_that_makes_them(http: httpx.AsyncClient, pipeline: StandInPipeline) -> None:
    pipeline.reply = lambda outgoing: {"object": "list", "data": [{"index": 0, "embedding": [0.5]}]}
    response = await http.post("/v1/embeddings", json={"model": "embed", "input": "x"})
    assert response.json()["data"][0]["embedding"] == [0.5]
    assert pipeline.requests[0].needs == {"embeddings"}


async def test_a_chat_model_asked_for_embeddings_says_what_would_make_them(
    http: httpx.AsyncClient, pipeline: StandInPipeline
) -> None:
    pipeline.error = Unsupported("no target can do what this request asks for")
    response = await http.post("/v1/embeddings", json={"model": SMALL.name, "input": "x"})
    assert (response.status_code, error_of(response)["code"]) == (400, "unsupported_feature")
    assert SMALL.name in error_of(response)["message"] and "abilities" in error_of(response)["message"]


async def test_a_node_whose_keys_are_all_revoked_is_closed_after_a_restart_too(pipeline: StandInPipeline) -> None:
    auth = Authenticator((), host="127.0.0.1", has_had_keys=True)
    with pytest.raises(Unauthorized, match="no API key was sent"):
        auth.authenticate({})
