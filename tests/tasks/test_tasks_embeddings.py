"""Embeddings travel verbatim, to the model that was named and to no other."""

from typing import Any

import pytest

from appliance.errors import BackendGarbage
from appliance.tasks import embeddings
from tests.tasks.rows import hosted, refusal, reply

BODY: dict[str, Any] = {"model": "acme/embed", "input": ["one", "two"], "dimensions": 64, "x_new": 1}


def test_the_body_travels_verbatim_and_needs_a_model_that_embeds() -> None:
    asked, (call,) = embeddings.read_embedding_request(BODY)
    assert (asked.endpoint, asked.model, asked.text) == ("embeddings", "acme/embed", "one\ntwo")
    assert asked.needs == {"embeddings"}
    (outgoing,) = call.outgoing(hosted("embeddings"))
    assert (outgoing.path, outgoing.body) == ("/embeddings", BODY)
    payload = {"data": [{"embedding": [0.5]}, {"embedding": [1.0]}], "usage": {}}
    assert call.read(hosted("embeddings"), [reply(payload)]).payload is payload


@pytest.mark.parametrize(
    "payload",
    [
        None,
        {},
        {"data": [{"embedding": [0.5]}]},
        {"data": [{"embedding": [0.5]}, {}]},
        {"data": [{"embedding": [0.5]}, {"embedding": "AAAA"}]},
    ],
)
def test_a_reply_without_every_vector_is_garbage(payload: Any) -> None:
    _, (call,) = embeddings.read_embedding_request(BODY)
    with pytest.raises(BackendGarbage):
        call.read(hosted("embeddings"), [reply(payload)])


def test_base64_vectors_are_text() -> None:
    _, (call,) = embeddings.read_embedding_request({**BODY, "input": "one", "encoding_format": "base64"})
    assert call.read(hosted("embeddings"), [reply({"data": [{"embedding": "AAAA"}]})])
    with pytest.raises(BackendGarbage):
        call.read(hosted("embeddings"), [reply({"data": [{"embedding": [0.5]}]})])


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"model": "auto"}, "model", "cannot be compared"),
        ({"model": None}, "model", "cannot be compared"),
        ({"input": None}, "input", "missing"),
        ({"input": []}, "input", "0 texts"),
        ({"input": ["x"] * 2_049}, "input", "2049"),
        ({"input": ""}, "input", "empty"),
        ({"input": ["x", ""]}, "input[1]", "empty"),
        ({"input": ["x", 5]}, "input[1]", "5"),
        ({"input": [1, 2]}, "input", "token ids"),
        ({"input": {}}, "input", "{}"),
        ({"encoding_format": "int8"}, "encoding_format", "base64"),
        ({"dimensions": 0}, "dimensions", "0"),
    ],
)
def test_wrong_fields_are_refused_by_name(change: dict[str, Any], param: str, words: str) -> None:
    error = refusal(embeddings.read_embedding_request, {**BODY, **change})
    assert error.param == param and words in error.message
