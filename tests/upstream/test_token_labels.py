"""Labels scored by reading single tokens: which reads are made, and that whole labels come out of them."""

import math
import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from appliance.core import Target, UpstreamReply
from appliance.errors import BackendGarbage, EngineBusy
from appliance.tasks.decisions import label_prompts, openai_shape
from appliance.upstream import client
from appliance.upstream.label_scoring.tree import LabelTreeScoring, mass, tree
from appliance.upstream.local import LocalTransport
from tests.standin import StandIn

END = 999
Tokens = tuple[int, ...]


class Language:
    """A made-up model: the next token's probabilities depend on the tokens before it, and on nothing else."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def next(self, before: Tokens) -> Mapping[int, float]:
        dice = random.Random(str(before))
        weights = [dice.random() + 0.01 for _ in range(self._vocabulary + 1)]
        tokens = [*range(self._vocabulary), END]
        return {token: math.log(weight / sum(weights)) for token, weight in zip(tokens, weights, strict=True)}

    def logprob(self, tokens: Sequence[int]) -> float:
        return sum(self.next(tuple(tokens[:place]))[token] for place, token in enumerate(tokens))


LABELS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=2, max_size=12, unique=True)


@given(LABELS)
def test_every_label_is_scored_by_what_tells_it_from_the_others(rows: list[Tokens]) -> None:
    language, root = Language(4), tree(rows, END)
    scoring, reads = LabelTreeScoring(root, len(rows), worth=0.0), 0
    parting: dict[Tokens, set[int]] = {}
    while scoring.due:
        for place, _ in scoring.due:
            parting[place.prefix] = set(place.children)
        reads += len(scoring.due)
        scoring.give([language.next(place.prefix) for place, _ in scoring.due])
    assert reads <= len(rows)
    for row, score in zip(rows, scoring.scores, strict=True):
        spelled = (*row, END)
        parts = [place for place in range(len(spelled)) if spelled[:place] in parting]
        assert score == pytest.approx(sum(language.next(spelled[:place])[spelled[place]] for place in parts))
    assert mass(scoring.scores) <= 1e-9


def test_labels_with_different_first_tokens_take_one_read() -> None:
    root = tree([(1, 2, 3), (4,), (5, 6)], END)
    assert set(root.children) == {1, 4, 5} and all(isinstance(child, int) for child in root.children.values())


def test_a_label_that_begins_another_is_told_by_the_end_of_the_turn() -> None:
    root = tree([(1,), (1, 2), (3,)], END)
    below = root.children[1]
    assert not isinstance(below, int)
    assert (below.prefix, below.children) == ((1,), {END: 0, 2: 1})


def test_places_that_hold_next_to_nothing_are_not_read() -> None:
    scoring = LabelTreeScoring(tree([(1, 1), (1, 2), (3,)], END), 3)
    scoring.give([{1: math.log(1e-6), 3: math.log(0.5)}])
    assert scoring.due == []
    assert scoring.scores[0] == scoring.scores[1] == pytest.approx(math.log(5e-7))


def test_the_same_tokens_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="same"):
        tree([(1, 2), (1, 2)], END)


class Server(StandIn):
    """Tokenises by words and answers reads as `Language` says. `status` is what reads are answered with."""

    status = 200
    without_logprobs = False
    most_prompt_tokens = 10_000

    async def __aenter__(self) -> "Server":
        await super().__aenter__()
        return self

    def app(self) -> Starlette:
        self.known: dict[str, int] = {}
        routes = [
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/v1/completions", self._read_one, methods=["POST"]),
        ]
        return Starlette(routes=routes)

    def _ids(self, text: str) -> list[int]:
        return [self.known.setdefault(word, len(self.known)) for word in text.split()]

    async def _tokenize(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        self.paths["/tokenize"] += 1
        if "prompt" in body:
            return JSONResponse({"tokens": self._ids(body["prompt"])})
        text = " ".join(f"<{one['role']}> {one['content']} <end>" for one in body["messages"])
        if body.get("continue_final_message"):
            text = text.removesuffix(" <end>")
        if body.get("add_generation_prompt"):
            text += " <assistant>"
        return JSONResponse({"tokens": self._ids(text)})

    async def _read_one(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        self.bodies.append(body)
        self.paths["/completions"] += 1
        if self.status != 200:
            return JSONResponse({"error": {"message": "busy", "code": self.status}}, self.status)
        if len(body["prompt"]) > self.most_prompt_tokens:
            said = "This model's maximum context length is 10 tokens. However, your prompt contains at least 11"
            return JSONResponse({"error": {"message": said, "code": 400}}, 400)
        read = {f"token_id:{token}": -1.0 - token / 100 for token in body["logprob_token_ids"]}
        logprobs = None if self.without_logprobs else {"top_logprobs": [read]}
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1}
        return JSONResponse({"choices": [{"logprobs": logprobs}], "usage": usage})


pytestmark = pytest.mark.anyio


def _target(server: Server) -> Target:
    return Target(
        "onsite/m", "onsite", "openai", server.address, "m", frozenset({"chat", "labels", "token_logprobs"}), 8192
    )


async def _ask(server: Server, inputs: Sequence[str], choices: Sequence[str], **more: Any) -> Any:
    question = {"type": "choice", "instructions": "About what?", "choices": [{"value": one} for one in choices]}
    _, calls = openai_shape.read_decision_batch({"model": "m", "inputs": list(inputs), "questions": [question], **more})
    target, door = _target(server), LocalTransport()
    try:
        (outgoing,) = calls[0].outgoing(target)
        letter = client.write_request(target, outgoing, stream=False, salt="salt")
        reply: UpstreamReply = await client.send_request(door, letter, permit=None, seconds=10)
        return calls[0].read(target, [reply])
    finally:
        await door.aclose()


async def test_decisions_are_answered_through_reads_of_single_tokens(tmp_path: Path) -> None:
    async with Server(uds=str(tmp_path / "s")) as server:
        judged = await _ask(server, ["one text", "another text"], ["late parcel", "late card", "thanks"])
        assert len(judged.rows) == 2
        (answer,) = judged.rows[0]
        assert sum(answer.probabilities) == pytest.approx(1.0) and 0 < answer.label_mass <= 1
        reads = [body["prompt"] for body in server.bodies]
        assert len(reads) == 4  # of each text: where the first tokens part, and where "late ..." does
        assert all(body["cache_salt"] == "salt" and body["max_tokens"] == 1 for body in server.bodies)
        before = server.paths["/tokenize"]
        await _ask(server, ["a third"], ["late parcel", "late card", "thanks"])
        assert server.paths["/tokenize"] == before + 1  # labels are known by now


async def test_the_short_layout_ends_within_the_turn(tmp_path: Path) -> None:
    async with Server(uds=str(tmp_path / "s")) as server:
        await _ask(server, ["one text"], ["a", "b"], layout="short")
        words = {number: word for word, number in server.known.items()}
        text = " ".join(words[token] for token in server.bodies[0]["prompt"])
        assert text.endswith("<user> one text Label:") and label_prompts.SHORT_CUE.strip() == "Label:"


async def test_more_labels_than_one_read_takes_are_read_in_parts(tmp_path: Path) -> None:
    async with Server(uds=str(tmp_path / "s")) as server:
        judged = await _ask(server, ["one text"], [f"w{number}" for number in range(200)])
        assert sorted(len(body["logprob_token_ids"]) for body in server.bodies) == [72, 128]
        (answer,) = judged.rows[0]
        assert all(left >= right for left, right in pairwise(answer.probabilities))


async def test_a_text_that_is_too_long_fails_alone(tmp_path: Path) -> None:
    async with Server(uds=str(tmp_path / "s")) as server:
        server.most_prompt_tokens = 60
        good, bad = (await _ask(server, ["short", "word " * 100], ["a", "b"])).rows
        assert len(good) == 1
        assert bad.code == "context_length_exceeded"


@pytest.mark.parametrize(("status", "expected"), [(503, EngineBusy), (200, BackendGarbage)])
async def test_what_is_wrong_with_the_engine_fails_the_whole(
    tmp_path: Path, status: int, expected: type[Exception]
) -> None:
    async with Server(uds=str(tmp_path / "s")) as server:
        server.status, server.without_logprobs = status, True
        with pytest.raises(expected):
            await _ask(server, ["one", "two"], ["a", "b"])
