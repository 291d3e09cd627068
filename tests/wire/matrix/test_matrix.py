"""Every inbound dialect to every outbound one and back: the official SDKs, the real application, stand-in providers."""

from typing import Any

import anthropic
import openai
import orjson
import pytest

from tests.google_sdk import errors as google_errors
from tests.providers.speech import CALLS, HELLO, REFUSES, SHORT, THINKS, TWO_CALLS, Called, Cut, Fail, Say
from tests.wire.matrix.clients import ENDS, FAILURES, INBOUND, PIXEL, Heard, Inbound, Question
from tests.wire.matrix.stages import OUTBOUND, Outbound, Stage, staged

pytestmark = [
    pytest.mark.anyio,
    # The SDK's own dealings with its HTTP library.
    pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession:DeprecationWarning"),
]
PAIRS = [(inbound, outbound) for inbound in INBOUND for outbound in OUTBOUND]
ULM = ("weather", {"city": "Ulm", "days": 2})
RESULT = "rain, 11 degrees"


async def told(inbound: Inbound, outbound: Outbound, says: Say, **asked: Any) -> tuple[Heard, Stage]:
    async with staged(inbound, outbound) as stage:
        stage.api.says = says
        heard = await stage.ask(Question(**asked))
        assert stage.api.wrongs == [], "the SDK's own types find fault with what was sent"
        assert len(stage.api.bodies) == 1
        stage.scene.check_nothing_is_held()
        return heard, stage


def ended(inbound: Inbound, heard: Heard, how: str) -> bool:
    return heard.end in ENDS[inbound][how]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("inbound", "outbound"), PAIRS)
async def test_text(inbound: Inbound, outbound: Outbound, stream: bool) -> None:
    heard, stage = await told(inbound, outbound, HELLO, stream=stream)
    assert heard.text == HELLO.text and ended(inbound, heard, "stop")
    assert (heard.prompt_tokens, heard.output_tokens) == (HELLO.prompt_tokens, HELLO.output_tokens)
    assert "How is the weather" in orjson.dumps(stage.api.bodies[0]).decode()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("inbound", "outbound"), PAIRS)
async def test_image(inbound: Inbound, outbound: Outbound, stream: bool) -> None:
    heard, stage = await told(inbound, outbound, HELLO, stream=stream, has_image=True)
    assert heard.text == HELLO.text
    assert PIXEL in orjson.dumps(stage.api.bodies[0]).decode()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("inbound", "outbound"), PAIRS)
async def test_tool_call(inbound: Inbound, outbound: Outbound, stream: bool) -> None:
    heard, _ = await told(inbound, outbound, CALLS, stream=stream, has_tool=True)
    assert heard.calls == [ULM] and ended(inbound, heard, "tool")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("inbound", "outbound"), PAIRS)
async def test_words_and_two_tool_calls(inbound: Inbound, outbound: Outbound, stream: bool) -> None:
    says = Say(text="Let me look.", calls=(Called(), Called("call_2", "weather", {"city": "Bonn"})))
    heard, _ = await told(inbound, outbound, says, stream=stream, has_tool=True)
    assert heard.calls == [ULM, ("weather", {"city": "Bonn"})] and heard.text == TWO_CALLS.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("inbound", "outbound"), PAIRS)
async def test_tool_result(inbound: Inbound, outbound: Outbound, stream: bool) -> None:
    heard, stage = await told(inbound, outbound, HELLO, stream=stream, has_tool=True, result=RESULT)
    assert heard.text == HELLO.text
    assert RESULT in orjson.dumps(stage.api.bodies[0]).decode()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("inbound", "outbound"), PAIRS)
async def test_thinking(inbound: Inbound, outbound: Outbound, stream: bool) -> None:
    """OpenAI's chat completions have no place for it, on their way out."""
    heard, _ = await told(inbound, outbound, THINKS, stream=stream)
    assert heard.text == THINKS.text
    assert heard.thought == ("" if outbound in ("openai", "engine") else THINKS.thought)
    assert heard.output_tokens == THINKS.output_tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("inbound", "outbound"), PAIRS)
async def test_refusal(inbound: Inbound, outbound: Outbound, stream: bool) -> None:
    heard, _ = await told(inbound, outbound, REFUSES, stream=stream)
    assert heard.text == "" and heard.calls == [] and ended(inbound, heard, "refusal")
    assert heard.refusal


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("inbound", "outbound"), PAIRS)
async def test_length(inbound: Inbound, outbound: Outbound, stream: bool) -> None:
    heard, _ = await told(inbound, outbound, SHORT, stream=stream)
    assert heard.text == SHORT.text and ended(inbound, heard, "length")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("inbound", "outbound"), PAIRS)
async def test_error(inbound: Inbound, outbound: Outbound, stream: bool) -> None:
    async with staged(inbound, outbound) as stage:
        stage.api.says = Fail(503, "overloaded_error")
        with pytest.raises(FAILURES[inbound]) as caught:
            await stage.ask(Question(stream=stream))
        stage.scene.check_nothing_is_held()
    assert status_of(caught.value) == (529 if inbound == "messages" else 503)


@pytest.mark.parametrize(("inbound", "outbound"), PAIRS)
async def test_cut_stream(inbound: Inbound, outbound: Outbound) -> None:
    async with staged(inbound, outbound) as stage:
        stage.api.says = Cut()
        with pytest.raises(FAILURES[inbound]):
            await stage.ask(Question(stream=True))
        stage.scene.check_nothing_is_held()


@pytest.mark.parametrize(("inbound", "outbound"), PAIRS)
async def test_error_within_a_stream(inbound: Inbound, outbound: Outbound) -> None:
    async with staged(inbound, outbound) as stage:
        stage.api.says = Fail(500, "server_error", late=True)
        with pytest.raises(FAILURES[inbound]):
            await stage.ask(Question(stream=True))
        stage.scene.check_nothing_is_held()


def status_of(error: Exception) -> int:
    if isinstance(error, openai.APIStatusError | anthropic.APIStatusError):
        return error.status_code
    assert isinstance(error, google_errors.APIError)
    return int(error.code)
