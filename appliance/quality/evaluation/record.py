"""Answers on disk as they come, so that an evaluation that was stopped goes on where it was."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import orjson

from appliance.core.json_types import JsonObject
from appliance.errors import RequestError
from appliance.quality.evaluation.client import EvalReply, EvalRequestOptions
from appliance.quality.evaluation.datasets import DatasetRow
from appliance.quality.evaluation.scoring import GradedRow


class AnswerRecord:
    """One JSONL file for any number of models; answers to other questions than those asked now are left alone.

    Without a path nothing is kept. Raises RequestError for a file that is no record.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._session = os.urandom(4).hex()
        self._known: dict[str, GradedRow] = {}
        self._seconds: dict[tuple[str, str], float] = {}
        """By asking and session: from its first request to its last answer."""
        if path is not None and path.exists():
            self._load(path)

    def known(self, asking: EvalRequestOptions, rows: Sequence[DatasetRow]) -> Mapping[int, GradedRow]:
        """Place of a row -> what was said of it before."""
        run_id = identity(asking)
        found = ((place, self._known.get(_key(run_id, row))) for place, row in enumerate(rows))
        return {place: result for place, result in found if result is not None}

    def seconds(self, asking: EvalRequestOptions) -> float:
        run_id = identity(asking)
        return sum(seconds for (one, _), seconds in self._seconds.items() if one == run_id)

    def add(self, asking: EvalRequestOptions, reply: EvalReply) -> None:
        """Failures are not kept, so that they are asked again."""
        run_id = identity(asking)
        place = (run_id, self._session)
        self._seconds[place] = max(self._seconds.get(place, 0.0), reply.elapsed_seconds)
        lines = []
        for row, result in zip(reply.rows, reply.results, strict=True):
            if result.error is None:
                self._known[_key(run_id, row)] = result
                about = {"asking": run_id, "session": self._session, "elapsed_seconds": reply.elapsed_seconds}
                lines.append(orjson.dumps({"key": _key(run_id, row), **about, "result": asdict(result)}))
        if self._path is not None and lines:
            with self._path.open("ab") as file:
                file.write(b"".join(line + b"\n" for line in lines))

    def _load(self, path: Path) -> None:
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                row = orjson.loads(line)
                self._known[row["key"]] = GradedRow(**row["result"])
                place = (row["asking"], row["session"])
                self._seconds[place] = max(self._seconds.get(place, 0.0), float(row["elapsed_seconds"]))
            except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                if number == 1:
                    raise RequestError(f"{path} holds no answers of an evaluation: name another file") from error
                continue  # a line that was cut short when the program was killed


def identity(asking: EvalRequestOptions) -> str:
    """Equal for askings that put the same question to the same model."""
    adapter = asking.adapter
    said: JsonObject = {
        "model": asking.model,
        "labels": list(asking.labels),
        "examples": list(asking.examples),
        "task": asking.task,
        "options": dict(asking.options),
        "prompt": adapter.prompt,
        "schema": adapter.schema,
    }
    return hashlib.sha256(orjson.dumps(said, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def _key(asking: str, row: DatasetRow) -> str:
    return hashlib.sha256(orjson.dumps([asking, row.text, row.asked])).hexdigest()[:24]
