"""Models that turn a text into a vector: static word pieces, and small encoders in ONNX form."""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from appliance.encoders.int8 import multiplies_int8, with_int8_products
from appliance.errors import ContextTooLong, ModelFileError

Floats = npt.NDArray[np.float32]

STATIC_MAX_TOKENS: Final = 8_192
ONNX_MAX_TOKENS: Final = 512
"""What encoders of the BERT family have positions for."""
_BATCH_TOKENS: Final = 512
"""Of one run of the encoder, padding included: what is computed of them stays in a core's cache. Texts a second of
processor time with 512, 1,024, 2,048 and 4,096, measured: 1,188, 1,021, 924 and 809."""
_RUN_TOKENS: Final = 22
"""What a run costs besides its tokens, in tokens. Measured with all-minilm-l6-v2: 1.2 ms, and 0.055 ms a token."""
_SLOWER_TOGETHER: Final = ("SkipLayerNormFusion",)
"""The run time adds and then normalises ten times as fast as in its one operator for both (onnxruntime 1.31)."""
_SMALLEST_NORM: Final = 1e-12


@dataclass(frozen=True, slots=True)
class Embedded:
    """A row for each text, of length 1, and the tokens each text came to."""

    vectors: Floats
    tokens: Sequence[int]


class Embedder(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def dimensions(self) -> int: ...

    @property
    def max_tokens(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Names the weights: heads trained on others must not be used with these."""

    @property
    def steps(self) -> int:
        """Batches computed so far."""

    def embed(self, texts: Sequence[str], *, truncate: bool = False) -> Embedded:
        """Raises ContextTooLong, naming the text, unless `truncate`."""


def normalise_rows(rows: Floats) -> Floats:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Floats = rows / np.maximum(norms, _SMALLEST_NORM)
    return unit


class StaticEmbedder:
    """The mean of fixed vectors, one for each word piece: no network is computed, so it takes microseconds a text."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.max_tokens, self.steps = name, STATIC_MAX_TOKENS, 0
        tensors = _tensors(folder)
        matrices = [tensor for tensor in tensors.values() if tensor.ndim == 2]
        if len(matrices) != 1:
            raise ModelFileError(f"{folder}: one matrix of token vectors was expected, {len(matrices)} are there")
        self.table: Floats = np.ascontiguousarray(matrices[0], dtype=np.float32)
        self.dimensions = self.table.shape[1]
        self._tokenizer = _tokenizer(folder)
        self.fingerprint = f"{name}:{self.table.shape[0]}x{self.dimensions}:{_digest(self.table)}"

    def pieces(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        """The token ids of each text that have a vector."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [_known(np.array(one.ids, dtype=np.int64), len(self.table)) for one in encoded]

    def sums(self, texts: Sequence[str]) -> Floats:
        """The sum of each text's token vectors, not brought to length 1."""
        rows = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        for place, ids in enumerate(self.pieces(texts)):
            if ids.size:
                rows[place] = self.table[ids].sum(axis=0)
        return rows

    def embed(self, texts: Sequence[str], *, truncate: bool = False) -> Embedded:
        pieces = self.pieces(texts)
        counts = [len(ids) for ids in pieces]
        _check_lengths(counts, self.max_tokens, self.name, truncate)
        rows = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        for place, ids in enumerate(pieces):
            if ids.size:
                rows[place] = self.table[ids[: self.max_tokens]].mean(axis=0)
        self.steps += 1
        return Embedded(normalise_rows(rows), counts)


class OnnxEmbedder:
    """A small encoder whose token states are averaged over the text."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        self.name, self.max_tokens, self.steps = name, ONNX_MAX_TOKENS, 0
        self._tokenizer = _tokenizer(folder)
        options = onnxruntime.SessionOptions()
        # One thread for each batch, not for parts of it: batches are small, and threads that wait for each other in
        # every one of a hundred operators compute a fifth less.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        path = folder / "model.onnx"
        try:
            model = path.read_bytes()
            self._session = onnxruntime.InferenceSession(
                with_int8_products(model) if multiplies_int8() else model,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=_SLOWER_TOGETHER,
            )
        except Exception as error:  # the library raises classes of its own that it does not export
            raise ModelFileError(f"{path} cannot be read: {str(error)[:200]}; pull {name} again") from error
        self._inputs = {one.name for one in self._session.get_inputs()}
        width = self._session.get_outputs()[0].shape[-1]
        if not isinstance(width, int):
            raise ModelFileError(f"{path}: its output has no fixed width, so it is no encoder that is known here")
        self.dimensions = width
        self.fingerprint = f"{name}:{width}:{path.stat().st_size}"

    def embed(self, texts: Sequence[str], *, truncate: bool = False) -> Embedded:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=True)
        counts = [len(one.ids) for one in encoded]
        _check_lengths(counts, self.max_tokens, self.name, truncate)
        rows = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        ids = [_cut(one.ids, self.max_tokens) for one in encoded]
        batches = _batches([len(one) for one in ids])
        run = self._pool.map if len(batches) > 1 else map
        for places, found in zip(
            batches, run(self._run, [[ids[place] for place in one] for one in batches]), strict=True
        ):
            rows[places] = found
            self.steps += 1
        return Embedded(normalise_rows(rows), counts)

    def _run(self, ids: Sequence[Sequence[int]]) -> Floats:
        width = max(1, max(len(one) for one in ids))
        tokens = np.zeros((len(ids), width), dtype=np.int64)
        mask = np.zeros_like(tokens)
        for place, one in enumerate(ids):
            tokens[place, : len(one)] = one
            mask[place, : len(one)] = 1
        feed = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": np.zeros_like(tokens)}
        states = self._session.run(None, {name: feed[name] for name in feed if name in self._inputs})[0]
        weights = mask[:, :, None].astype(np.float32)
        mean: Floats = (states * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1.0)
        return mean


def load_embedder(name: str, folder: Path, threads: int) -> Embedder:
    """The model that lies in `folder`. Raises ModelFileError."""
    if (folder / "model.onnx").is_file():
        return OnnxEmbedder(name, folder, threads)
    return StaticEmbedder(name, folder)


def find_models(models: Path) -> dict[str, Path]:
    """Embedding models by name: folders below `models`/NAME/VARIANT that hold a tokenizer and weights in a form that is
    read here, and no configuration of a model that generates text."""
    found: dict[str, Path] = {}
    for folder in sorted(models.glob("*/*")):
        weights = (folder / "model.onnx").is_file() or (folder / "model.safetensors").is_file()
        if weights and (folder / "tokenizer.json").is_file() and not _generates(folder):
            found.setdefault(folder.parent.name, folder)
    return found


def _generates(folder: Path) -> bool:
    """Whether a configuration says that it is a language model in safetensors, which another engine serves."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return not (folder / "model.onnx").is_file() and isinstance(config, dict) and "architectures" in config


def _tensors(folder: Path) -> Mapping[str, npt.NDArray[Any]]:
    path = folder / "model.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelFileError(f"{path} cannot be read: {error}; pull the model again") from error


def _tokenizer(folder: Path) -> Any:
    # Threads of its own would compete with the encoder's; texts are short.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ModelFileError(f"{path} cannot be read: {str(error)[:200]}; pull the model again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _known(ids: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    return ids if not ids.size or ids.max() < size else ids[ids < size]


def _cut(ids: Sequence[int], most: int) -> Sequence[int]:
    """The last token closes the text, so it stays."""
    return ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]


def _check_lengths(counts: Sequence[int], most: int, name: str, truncate: bool) -> None:
    if truncate:
        return
    for place, count in enumerate(counts):
        if count > most:
            raise ContextTooLong(
                f"input[{place}] has {count} tokens, and {name} reads at most {most}: send a shorter text",
                param="input",
            )


def _batches(lengths: Sequence[int]) -> Sequence[npt.NDArray[np.int64]]:
    """Places of texts of like length together, in batches of at most _BATCH_TOKENS; where filling up a batch's texts
    to the length of the next one costs more than a run of its own, a new batch begins."""
    order = np.argsort(lengths, kind="stable")
    batches, start, filled = [], 0, 0
    for place in range(1, len(order) + 1):
        if place < len(order):
            here, longest = place - start, lengths[order[place]]
            filled += here * (longest - lengths[order[place - 1]])
            if filled <= _RUN_TOKENS and (here + 1) * longest <= _BATCH_TOKENS:
                continue
        batches.append(order[start:place])
        start, filled = place, 0
    return batches


def _digest(table: Floats) -> str:
    """Enough to tell two tables apart."""
    return f"{float(np.abs(table[:: max(1, len(table) // 64)]).sum()):.6f}"
