"""The embedded model in Q8_0: with the kernels it answers as it does without, and forks answer as whole prompts."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from appliance.llamacpp.calibrate.quantise import derive_variant
from appliance.llamacpp.calibrate.variant_quality import load_quality_texts
from tests.llamacpp.kernels import reading
from tests.llamacpp.kernels.conftest import Run
from tests.llamacpp.kernels.reading import LogProbs

PARAMETERS = 134_515_008
BEGINNING = (
    "You sort letters to a hotel. The kinds are: booking, complaint, invoice, praise, lost property. "
    "Answer with one kind. Letter: I left my green umbrella in room 214 when I travelled home on Monday. "
)
ENDINGS = [
    "Please tell me whether you have found it.",
    "The rain here is terrible.",
    "Kind:",
    "Besides, the breakfast was cold and nobody came when I rang, which I did three times.",
    "Kind of this letter:",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def q8_0(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("q8_0") / "q8_0.gguf"
    derive_variant(smollm2_path, path, "q8_0", parameters=PARAMETERS, threads=2)
    yield path
    path.unlink()


def divergence(source: LogProbs, other: LogProbs) -> float:
    """Mean Kullback-Leibler divergence over all rows, in nats."""
    p, q = source.astype(np.float64), other.astype(np.float64)
    return float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))


def same_top(one: LogProbs, other: LogProbs) -> float:
    return float(np.mean(one.argmax(-1) == other.argmax(-1)))


def test_the_next_tokens_are_those_of_llama_cpps_own_kernels(q8_0: Path, kernels: Run, plain: Run) -> None:
    prompts = [text.text for text in load_quality_texts()[:24]]
    own, ours = (run(reading.last_positions, q8_0, prompts) for run in (plain, kernels))
    assert len(own) >= 150
    assert same_top(own, ours) >= 0.9
    assert divergence(own, ours) < 0.02
    assert not np.array_equal(own, ours), "the kernels have computed it"


def test_cached_and_forked_sequences_answer_as_whole_prompts(q8_0: Path, kernels: Run) -> None:
    whole, cached, forked = kernels(reading.endings, q8_0, BEGINNING, ENDINGS)
    # To the bit: one bit in attention would round activations after it to their neighbours, and move a label's log
    # probability by up to 0.4.
    assert np.array_equal(whole, cached) and np.array_equal(whole, forked)
