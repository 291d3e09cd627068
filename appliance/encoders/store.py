"""Classifiers on disk: DATA/NAME/vN/, each version whole or not there at all, and which of them serves.

A version is two files: `weights.safetensors` (numbers) and `head.json` (labels, words, report). None of it is code.
Held-out scores lie in the weights, without the texts they belong to.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypedDict

import numpy as np
import numpy.typing as npt
import orjson
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from appliance.core.json_types import JsonObject
from appliance.encoders.embedders import Embedder, StaticEmbedder
from appliance.encoders.features import FeatureVocabulary
from appliance.encoders.linear_models import LinearModel, ProbabilityCalibration
from appliance.encoders.two_stage import ClassifierHead, StageModel, TrainedClassifier, build_stage
from appliance.errors import ModelFileError, NotFound, RequestError
from appliance.files import OWNER_ONLY, replace_file, replacing_file, sync_to_disk

FORMAT: Final = 1
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SERVING: Final = "serving.json"
_SECOND: Final = "second."
"""Before the names of the second step's tensors."""
_KEPT: Final = "examples.jsonl"


Tensors = Mapping[str, npt.NDArray[Any]]


class SecondStageFile(TypedDict):
    calibration: Mapping[str, float]
    ask_below: float


class HeadFile(TypedDict):
    """head.json."""

    format: int
    name: str
    version: int
    made_at: str
    labels: list[str]
    calibration: Mapping[str, float]
    second: SecondStageFile | None
    strange_from: float
    """OOD score from which on a text counts as out of scope."""
    models: Mapping[str, str]
    """Fingerprints of the models it was trained on, by kind."""
    report: JsonObject
    lexicon: Mapping[str, list[str]]
    """Words, pairs and pieces that are features."""


@dataclass(frozen=True, slots=True)
class StoredClassifier:
    """One version as it lies there."""

    name: str
    version: int
    folder: Path
    facts: HeadFile


def check_name(name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"name is {str(name)[:60]!r}: it must be 1 to 64 of a-z, 0-9, '.', '_', '-', a letter or digit first",
            param="name",
        )
    return name


class ClassifierStore:
    """All classifiers of one data directory. One writer at a time for each name."""

    def __init__(self, data: Path) -> None:
        self.data = data

    def list_names(self) -> Sequence[str]:
        """Those that have a version to serve."""
        return [path.parent.name for path in sorted(self.data.glob(f"*/{_SERVING}"))]

    def find_serving(self, name: str) -> int:
        """Raises NotFound."""
        check_name(name)
        try:
            return int(json.loads((self.data / name / _SERVING).read_text())["version"])
        except FileNotFoundError:
            known = ", ".join(self.list_names()) or "there is none yet"
            raise NotFound(f"no classifier {name!r} here ({known})") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelFileError(f"{self.data / name / _SERVING} cannot be read ({error!r}): roll back") from error

    def list_versions(self, name: str) -> Sequence[int]:
        folders = (self.data / name).glob("v*")
        return sorted(int(one.name[1:]) for one in folders if one.name[1:].isdigit() and (one / "head.json").is_file())

    def describe(self, name: str, version: int | None = None) -> StoredClassifier:
        """Raises NotFound, naming the versions there are."""
        number = self.find_serving(name) if version is None else version
        folder = self.data / name / f"v{number}"
        return StoredClassifier(name, number, folder, self._read_head(name, number))

    def save(
        self, name: str, trained: TrainedClassifier, *, made_at: str, models: Mapping[str, str], serve: bool = True
    ) -> int:
        """Write a new version, and let it serve unless it is a candidate beside one that does.

        Raises OSError where the disk fails; then nothing has changed.
        """
        folder = self.data / check_name(name)
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(one.name[1:]) for one in folder.glob("v*") if one.name[1:].isdigit()]
        number = max(taken, default=0) + 1
        draft = folder / f".v{number}.part"
        shutil.rmtree(draft, ignore_errors=True)
        try:
            draft.mkdir()
            with replacing_file(draft / "weights.safetensors") as path:
                save_file(_write_tensors(trained), path)
            replace_file(draft / "head.json", orjson.dumps(_write_head(name, number, trained, made_at, models)))
            draft.replace(folder / f"v{number}")
            sync_to_disk(folder)
            if serve or not (folder / _SERVING).exists():
                self._point(name, number)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        return number

    def roll_back(self, name: str, version: int | None) -> int:
        """Let an earlier version serve: the one named, or the last before the serving one. Raises NotFound."""
        current = self.find_serving(name)
        if version is None:
            earlier = [number for number in self.list_versions(name) if number < current]
            if not earlier:
                raise NotFound(f"classifier {name!r} has no version before {current}")
            version = earlier[-1]
        self._read_head(name, version)
        self._point(name, version)
        return version

    def remove_version(self, name: str, version: int) -> None:
        """Raises NotFound, and RequestError for the one that serves."""
        if self.find_serving(name) == version:
            raise RequestError(f"version {version} of {name!r} serves: roll back to another one first", param="version")
        self._read_head(name, version)
        shutil.rmtree(self.data / name / f"v{version}")

    def keep_examples(self, name: str, texts: Sequence[str], labels: Sequence[str]) -> None:
        """Keep examples beside the versions, in place of those kept before, so that it can be trained on them again."""
        folder = self.data / check_name(name)
        folder.mkdir(parents=True, exist_ok=True)
        rows = (orjson.dumps({"text": text, "label": label}) for text, label in zip(texts, labels, strict=True))
        replace_file(folder / _KEPT, b"\n".join(rows), mode=OWNER_ONLY)

    def read_kept_examples(self, name: str) -> Sequence[Mapping[str, str]]:
        path = self.data / check_name(name) / _KEPT
        try:
            return [orjson.loads(line) for line in path.read_bytes().splitlines()]
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise ModelFileError(f"{path} cannot be read ({error}): remove it, or give the examples again") from error

    def remove(self, name: str) -> None:
        """Raises NotFound."""
        self.find_serving(name)
        # Out of sight first: what is half deleted must not serve.
        (self.data / name / _SERVING).unlink()
        shutil.rmtree(self.data / name)

    def load(
        self, name: str, version: int | None, vectors: StaticEmbedder | None, encoders: Mapping[str, Embedder]
    ) -> ClassifierHead:
        """Raises NotFound, and ModelFileError where a file is damaged or a model that it builds on is not here."""
        number = self.find_serving(name) if version is None else version
        facts = self._read_head(name, number)
        path = self.data / name / f"v{number}" / "weights.safetensors"
        try:
            tensors = load_file(path)
            return _build_head(facts, tensors, vectors, encoders)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ModelFileError(f"{path} cannot be used ({error!r}): roll back or train again") from error

    def read_held_out(self, name: str, version: int | None = None) -> Tensors:
        """Of each held-out row: `confidence`, `right`, `strangeness`. No texts."""
        number = self.find_serving(name) if version is None else version
        self._read_head(name, number)
        tensors = load_file(self.data / name / f"v{number}" / "weights.safetensors")
        return {name.removeprefix("held."): rows for name, rows in tensors.items() if name.startswith("held.")}

    def _read_head(self, name: str, version: int) -> HeadFile:
        path = self.data / check_name(name) / f"v{version}" / "head.json"
        try:
            facts: HeadFile = orjson.loads(path.read_bytes())
        except FileNotFoundError:
            known = ", ".join(str(number) for number in self.list_versions(name)) or "none"
            raise NotFound(f"classifier {name!r} has no version {version}; it has {known}") from None
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{path} cannot be read ({error}): roll back or train again") from error
        if facts.get("format") != FORMAT:
            raise ModelFileError(f"{path} is of format {facts.get('format')!r}, this program reads {FORMAT}")
        return facts

    def _point(self, name: str, version: int) -> None:
        replace_file(self.data / name / _SERVING, json.dumps({"version": version}))


def _write_tensors(trained: TrainedClassifier) -> dict[str, npt.NDArray[Any]]:
    tensors: dict[str, npt.NDArray[Any]] = {}
    for prefix, step in (("", trained.first), (_SECOND, trained.second)):
        if step is not None:
            linear = step.linear
            tensors |= {f"{prefix}linear.{name}": np.ascontiguousarray(one) for name, one in linear.weights.items()}
            tensors[f"{prefix}bias"] = np.ascontiguousarray(linear.bias)
    tensors |= {f"rarity.{name}": np.ascontiguousarray(rows) for name, rows in trained.vocabulary.weights.items()}
    tensors["held.confidence"] = trained.held_confidences.astype(np.float32)
    tensors["held.right"] = trained.held_right.astype(np.uint8)
    tensors["held.strangeness"] = trained.held_ood_scores.astype(np.float32)
    return tensors


def _write_head(
    name: str, number: int, trained: TrainedClassifier, made_at: str, models: Mapping[str, str]
) -> HeadFile:
    vocabulary = trained.vocabulary
    return {
        "format": FORMAT,
        "name": name,
        "version": number,
        "made_at": made_at,
        "labels": list(trained.labels),
        "calibration": asdict(trained.first.calibration),
        "second": None if trained.second is None else _write_second(trained),
        "strange_from": trained.ood_threshold,
        "models": dict(models),
        "report": trained.report,
        "lexicon": {
            "words": list(vocabulary.words),
            "pairs": list(vocabulary.pairs),
            "pieces": list(vocabulary.pieces),
        },
    }


def _write_second(trained: TrainedClassifier) -> SecondStageFile:
    assert trained.second is not None
    return {"calibration": asdict(trained.second.calibration), "ask_below": trained.escalate_below}


def _build_head(
    facts: HeadFile,
    tensors: Tensors,
    vectors: StaticEmbedder | None,
    encoders: Mapping[str, Embedder],
) -> ClassifierHead:
    built_on = facts["models"]
    if any(name.endswith("linear.static") for name in tensors):
        _check_same(built_on.get("static"), None if vectors is None else vectors.fingerprint)
    else:
        vectors = None
    encoder = next((one for one in encoders.values() if one.fingerprint == built_on.get("encoder")), None)
    if any(name.endswith("linear.encoder") for name in tensors):
        _check_same(built_on.get("encoder"), None if encoder is None else encoder.fingerprint)
    words = facts["lexicon"]
    rarity = {name.removeprefix("rarity."): rows for name, rows in tensors.items() if name.startswith("rarity.")}
    vocabulary = FeatureVocabulary(words["words"], words["pairs"], words["pieces"], rarity, vectors)
    second = facts.get("second")
    return ClassifierHead(
        labels=tuple(facts["labels"]),
        first=_build_stage(tensors, "", vocabulary, encoder, facts["calibration"]),
        ood_threshold=float(facts["strange_from"]),
        second=None if second is None else _build_stage(tensors, _SECOND, vocabulary, encoder, second["calibration"]),
        escalate_below=0.0 if second is None else float(second["ask_below"]),
    )


def _build_stage(
    tensors: Tensors,
    prefix: str,
    vocabulary: FeatureVocabulary,
    encoder: Embedder | None,
    calibration: Mapping[str, float],
) -> StageModel:
    start = f"{prefix}linear."
    weights = {name.removeprefix(start): rows for name, rows in tensors.items() if name.startswith(start)}
    linear = LinearModel(weights, tensors[f"{prefix}bias"])
    return build_stage(vocabulary, linear, encoder, ProbabilityCalibration(**calibration))


def _check_same(wanted: str | None, here: str | None) -> None:
    if wanted != here:
        name = str(wanted).partition(":")[0]
        raise ModelFileError(f"it was trained on {wanted}, and {here or 'nothing like it'} is here: pull {name} again")
