"""A model is given back only when nobody computes with it any more, and its vocabulary is read no more afterwards."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.errors import EngineBusy
from appliance.llamacpp.decode.constraints import GrammarCompiler
from appliance.llamacpp.engine import LlamaEngine
from appliance.llamacpp.engine_protocol import SequenceRequest
from appliance.llamacpp.model import LlamaModel
from appliance.llamacpp.scheduler.step import StepResult

pytestmark = pytest.mark.anyio


@pytest.fixture
def own_model(smollm2_path: Path) -> Iterator[LlamaModel]:
    model = LlamaModel.load(smollm2_path, threads=1, context_tokens=512, sequences=2, slot_tokens=0)
    yield model
    model.close()


async def test_a_model_is_not_freed_under_a_thread_that_does_not_stop(
    own_model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.llamacpp.engine._JOIN_SECONDS", 0.01)
    engine = LlamaEngine(own_model, calibrate=False)
    inside, go_on = threading.Event(), threading.Event()

    def hang() -> StepResult:
        inside.set()
        go_on.wait()
        return StepResult()

    monkeypatch.setattr(engine._runner, "run_step", hang)
    engine.start()
    engine.submit(SequenceRequest(prompt=[1], max_tokens=2))
    inside.wait()
    await engine.close(0)
    own_model.close()
    assert own_model.memory_length(0) == 0  # still there to be asked
    go_on.set()
    engine._thread.join()
    monkeypatch.setattr(own_model, "_abandoned", False)


async def test_a_model_of_an_engine_that_stopped_is_freed(own_model: LlamaModel) -> None:
    engine = LlamaEngine(own_model, calibrate=False)
    engine.start()
    await engine.close(0)
    own_model.close()
    assert own_model._handle is None


async def test_no_schema_is_compiled_against_a_vocabulary_that_is_gone(own_model: LlamaModel) -> None:
    grammars = GrammarCompiler(own_model.vocab_pointer, own_model.end_tokens, vocabulary_size=own_model.vocabulary_size)
    grammars.close()
    with pytest.raises(EngineBusy, match="shutting down"):
        grammars.compile({"type": "object"})
