"""What a model makes of prompts, in a process with the kernels or without."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt

from appliance.llamacpp.model import LlamaModel

LogProbs = npt.NDArray[np.float32]

_POSITIONS = 8


def last_positions(path: Path, prompts: Sequence[str]) -> LogProbs:
    """Log probabilities of the next token at the last positions of each prompt: (positions of all, vocabulary)."""
    with closing(_loaded(path)) as model:
        found = []
        for prompt in prompts:
            tokens = model.tokenize(prompt)[: model.batch.outputs_max]
            model.memory_clear()
            model.batch.clear()
            model.batch.add_each(tokens, list(range(len(tokens))), [0] * len(tokens))
            found.append(_decoded(model)[-_POSITIONS:])
        return np.concatenate(found)


def endings(path: Path, beginning: str, ends: Sequence[str]) -> tuple[LogProbs, LogProbs, LogProbs]:
    """Log probabilities after each ending, (endings, vocabulary): computed whole, with the beginning cached, and as
    forks of one beginning in one batch."""
    with closing(_loaded(path)) as model:
        begin, rest = model.tokenize(beginning), [model.tokenize(end) for end in ends]
        whole = []
        for tokens in rest:
            model.memory_clear()
            whole.append(_run(model, [(begin + tokens, 0, 0)]))
        model.memory_clear()
        _run(model, [(begin, 0, 0)])
        cached = []
        for tokens in rest:
            model.memory_copy(0, 1, 0, len(begin))
            cached.append(_run(model, [(tokens, len(begin), 1)]))
            model.memory_remove(1, 0)
        for fork in range(len(rest)):
            model.memory_copy(0, fork + 1, 0, len(begin))
        forked = _run(model, [(tokens, len(begin), fork + 1) for fork, tokens in enumerate(rest)])
        return np.concatenate(whole), np.concatenate(cached), forked


def _loaded(path: Path) -> LlamaModel:
    return LlamaModel.load(path, threads=2, context_tokens=512, sequences=8, batch_tokens=256, slot_tokens=0)


def _run(model: LlamaModel, runs: Sequence[tuple[list[int], int, int]]) -> LogProbs:
    """Compute runs of (tokens, first position, sequence); the log probabilities after each."""
    model.batch.clear()
    for tokens, position, sequence in runs:
        model.batch.add(tokens, position, sequence, last_output=True)
    return _decoded(model)


def _decoded(model: LlamaModel) -> LogProbs:
    assert model.decode() == 0, model.last_log_lines()
    logits = model.rows.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)), np.float32)
