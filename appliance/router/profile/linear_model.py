"""The learned profile: one sum over the weights of a text's features. Trained by `python -m scripts.train_profile`.

Task: the highest of eight linear scores (tool use is not among them: whether tools are given is known).
Complexity: where the task starts, moved up or down by how hard the text looks among texts of any task. "Hard" was
learned from questions that a weak and a strong model both answered: what the strong one gains over the weak one.
"""

import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import IO, Any, Final, get_args

import numpy as np
import orjson
from numpy.typing import NDArray

from appliance.core import Request, Task
from appliance.core.json_types import JsonObject
from appliance.errors import ConfigError
from appliance.router.profile.estimate import BASE_COMPLEXITY, SIMPLE, SIMPLE_SCALE, ProfileEstimate, given_task
from appliance.router.profile.features import BUCKETS, FEATURE_VERSION, extract_features
from appliance.router.profile.keywords import CUES, has_choices, is_word_problem
from appliance.router.profile.text_sample import TextSample

TASKS: Final[tuple[Task, ...]] = tuple(task for task in get_args(Task) if task != "tool_use")
COLUMNS: Final = (*TASKS, "difficulty", "rarity")
"""`rarity`: how much a feature counts at all, by how few texts have it."""

MARKS: Final = (*(cue.name for cue in CUES), "a word problem", "choices to choose from")
"""What the rules see, as features: the cues know how tasks are asked for, the words know what about."""

FILE: Final = "weights.npz"

_SPREAD: Final = 0.3
_BELOW: Final = 0.06
"""Difficulty moves complexity from this much below the task's start to `_SPREAD` above that: so the easiest fifth of
code and reasoning stays under the default policy's mark."""


@dataclass(frozen=True, slots=True)
class LinearWeights:
    table: NDArray[np.float32]
    """[BUCKETS, len(COLUMNS)]; rarity has been multiplied into the other columns."""
    marks: NDArray[np.float32]
    """[len(MARKS), len(TASKS)]"""
    offsets: NDArray[np.float32]
    """[len(TASKS)]"""
    length_weight: float
    length_offset: float
    """difficulty += length_weight * (log words - length_offset)"""
    difficulty_scale: float
    """One standard deviation of difficulty over the training texts."""
    about: JsonObject
    """Features, sources with licences, digest of the arrays, and figures measured on texts not trained on."""


@dataclass(frozen=True, slots=True)
class LinearScores:
    tasks: NDArray[np.float32]
    """In the order of TASKS."""
    difficulty: float
    """In standard deviations; 0 is usual."""


def score_features(text: str, sample: TextSample, weights: LinearWeights) -> LinearScores:
    """`sample` is that of `text`."""
    features = extract_features(text)
    tasks = weights.offsets + list_marks(sample) @ weights.marks
    length = weights.length_weight * (features.log_words - weights.length_offset)
    if not len(features.buckets):
        return LinearScores(tasks, length / weights.difficulty_scale)
    rows = weights.table[features.buckets]
    sums = rows[:, :-1].sum(axis=0)
    rarity = rows[:, -1]
    sums /= np.sqrt(np.square(rarity).sum() + np.float32(1e-9))
    return LinearScores(sums[:-1] + tasks, (float(sums[-1]) + length) / weights.difficulty_scale)


def list_marks(sample: TextSample) -> NDArray[np.float32]:
    """1 or 0 for each of MARKS."""
    found = [cue.is_in(sample) for cue in CUES]
    return np.array([*found, is_word_problem(sample), has_choices(sample)], np.float32)


def guess_profile(request: Request, sample: TextSample, weights: LinearWeights) -> ProfileEstimate:
    """A fraction of a millisecond, whatever the length of the text; `sample` is that of the text."""
    scores = score_features(request.text, sample, weights)
    given = given_task(request)
    if given is not None:
        task, why = given
    else:
        second, first = np.argsort(scores.tasks, kind="stable")[-2:]
        task = TASKS[first]
        why = f"learned, {scores.tasks[first] - scores.tasks[second]:.2f} before {TASKS[second]}"
    complexity = compute_complexity(task, scores.difficulty)
    because = f"{task}, difficulty {scores.difficulty:+.1f} (learned)"
    return ProfileEstimate(task, complexity, (f"{task}: {why}", f"complexity {complexity:.2f}: {because}"))


def compute_complexity(task: Task, difficulty: float) -> float:
    """Between 0 and 1; `difficulty` in standard deviations. The order of difficulties within a task is kept."""
    scale = SIMPLE_SCALE if task in SIMPLE else 1.0
    share = 1.0 / (1.0 + np.exp(-2.0 * min(max(difficulty, -10.0), 10.0)))
    return round(BASE_COMPLEXITY[task] + scale * (_SPREAD * float(share) - _BELOW), 4)


@lru_cache(maxsize=1)
def load_shipped_weights() -> LinearWeights:
    """Those of the package. Raises ConfigError where the file is not there, damaged or of another version."""
    path = files("appliance.router.profile") / FILE
    try:
        with path.open("rb") as file:
            return read_weights(file)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(
            f"the learned profiler's weights cannot be used: {error}; install the appliance again, or set "
            'profiler = "rules"',
            field="defaults.profiler",
        ) from error


def read_weights(file: IO[bytes]) -> LinearWeights:
    """Raises ValueError or KeyError for what does not fit this code, and what zip files raise for what is cut off.

    Nothing in the file is ever run.
    """
    with np.load(file, allow_pickle=False) as arrays:
        about = orjson.loads(arrays["about"].tobytes())
        table, rest = arrays["table"], arrays["rest"]
    if about["features"] != feature_name() or about["columns"] != list(COLUMNS):
        raise ValueError(f"they are for features {about['features']}, and these are {feature_name()}")
    if about["digest"] != digest_weights(table, rest):
        raise ValueError("they are damaged: their digest is not the one they were saved with")
    if table.shape != (BUCKETS, len(COLUMNS)) or rest.shape != ((len(MARKS) + 1) * len(TASKS) + 3,):
        raise ValueError(f"their shapes are {table.shape} and {rest.shape}")
    length_weight, length_offset, difficulty_scale = (float(one) for one in rest[-3:])
    by_task = rest[:-3].reshape(len(MARKS) + 1, len(TASKS))
    return LinearWeights(
        table=table.astype(np.float32),
        marks=by_task[:-1],
        offsets=by_task[-1],
        length_weight=length_weight,
        length_offset=length_offset,
        difficulty_scale=difficulty_scale,
        about=about,
    )


def write_weights(file: IO[bytes], weights: LinearWeights) -> None:
    """The same weights always make the same file."""
    table = weights.table.astype(np.float16)
    tail = (weights.length_weight, weights.length_offset, weights.difficulty_scale)
    rest = np.concatenate((weights.marks.ravel(), weights.offsets, tail)).astype(np.float32)
    about = {
        **weights.about,
        "features": feature_name(),
        "columns": list(COLUMNS),
        "digest": digest_weights(table, rest),
    }
    text = orjson.dumps(about, option=orjson.OPT_SORT_KEYS)
    np.savez_compressed(file, table=table, rest=rest, about=np.frombuffer(text, np.uint8))


def feature_name() -> str:
    """Version of the hashing and a digest of the cues: weights learned with other cues do not fit."""
    cues = [(cue.task, cue.name, sorted(cue.words), sorted(cue.gate), cue.pattern.pattern, cue.mark) for cue in CUES]
    return f"{FEATURE_VERSION}-{hashlib.sha256(repr(cues).encode()).hexdigest()[:12]}"


def digest_weights(table: NDArray[Any], rest: NDArray[Any]) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(table).tobytes())
    digest.update(np.ascontiguousarray(rest).tobytes())
    return digest.hexdigest()
