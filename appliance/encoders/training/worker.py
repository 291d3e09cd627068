"""One training, in a process of its own so that serving never waits: examples on stdin, progress and result on stdout.

    python -m appliance.encoders.training.worker --data DIRECTORY --models DIRECTORY --threads N

Each line of output is one JSON object: {"step", "share"} while it works, then {"version"} or {"error"}.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import orjson

from appliance.encoders.embedders import OnnxEmbedder, StaticEmbedder
from appliance.encoders.model_cache import ModelCache
from appliance.encoders.store import ClassifierStore
from appliance.encoders.training.examples import Examples
from appliance.encoders.training.jobs import TrainingOrder
from appliance.encoders.training.trainer import CandidateModels, train_classifier
from appliance.errors import ApplianceError, OperatorError
from appliance.worker.json_log import log, log_library_warnings
from appliance.worker.parent_guard import end_with_parent

_NICENESS = 10


def main() -> int:
    log_library_warnings()
    logging.captureWarnings(True)
    parser = argparse.ArgumentParser(prog="python -m appliance.encoders.training.worker")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    end_with_parent()
    os.nice(_NICENESS)
    order = TrainingOrder(**orjson.loads(sys.stdin.buffer.read()))
    try:
        _say({"version": _learn(order, options)})
    except ApplianceError as error:
        _say({"error": error.message, "code": error.code})
    except OSError as error:
        failure = OperatorError(f"the version cannot be written ({error.strerror or error}): free some space and retry")
        _say({"error": failure.message, "code": failure.code})
    return 0


def _learn(order: TrainingOrder, options: argparse.Namespace) -> int:
    truth = np.array(order.truth, dtype=np.int64)
    examples = Examples(tuple(order.texts), truth, tuple(order.labels), tuple(order.notes))
    model_cache = ModelCache(options.models, options.threads)
    models = _load_models(model_cache, order.encoder, wants_encoder=order.max_tier != "words")
    trained = train_classifier(
        examples,
        models,
        wanted_accuracy=order.wanted_accuracy,
        max_tier=order.max_tier,
        progress=lambda step, share: _say({"step": step, "share": round(share, 3)}),
        clock=time.monotonic,
    )
    _say({"step": "writing the version", "share": 0.98})
    built_on = {
        kind: model.fingerprint
        for kind, model in (("static", models.vectors), ("encoder", models.encoder))
        if model is not None
    }
    made_at = datetime.now(UTC).isoformat(timespec="seconds")
    return ClassifierStore(options.data).save(order.name, trained, made_at=made_at, models=built_on, serve=order.serve)


def _load_models(model_cache: ModelCache, wanted: str | None, *, wants_encoder: bool) -> CandidateModels:
    """The first static model and the wanted encoder, or the first one. What cannot be read is left out, and said."""
    vectors: StaticEmbedder | None = None
    encoder: OnnxEmbedder | None = None
    for name, kind in model_cache.list_kinds().items():
        if kind == "onnx" and (not wants_encoder or (wanted is not None and name != wanted)):
            continue
        try:
            model = model_cache.get_embedder(name)
        except ApplianceError as error:
            log("model_left_out", model=name, reason=error.message)
            continue
        if isinstance(model, StaticEmbedder):
            vectors = vectors or model
        elif isinstance(model, OnnxEmbedder):
            encoder = encoder or model
    return CandidateModels(vectors, encoder)


def _say(fact: Mapping[str, str | int | float]) -> None:
    sys.stdout.buffer.write(orjson.dumps(fact) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
