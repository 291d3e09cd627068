"""The embedding models that lie on this machine, each loaded when it is first used."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from appliance.encoders.embedders import Embedder, StaticEmbedder, find_models, load_embedder
from appliance.errors import UnknownModel

Kind = Literal["static", "onnx"]


class ModelCache:
    """`models` is the data directory's folder of models; what is pulled later is found too. Safe from threads."""

    def __init__(self, models: Path, threads: int) -> None:
        self._models, self._threads = models, threads
        self._loaded: dict[str, Embedder] = {}
        self._lock = threading.Lock()

    def list_kinds(self) -> Mapping[str, Kind]:
        found = find_models(self._models)
        return {name: "onnx" if (folder / "model.onnx").is_file() else "static" for name, folder in found.items()}

    def get_embedder(self, name: str) -> Embedder:
        """Raises UnknownModel, and ModelFileError where its files cannot be read."""
        with self._lock:
            if name not in self._loaded:
                found = find_models(self._models)
                if name not in found:
                    known = ", ".join(found) or "none is here: appliance models pull all-minilm-l6-v2"
                    raise UnknownModel(f"no embedding model {name!r} on this machine ({known})", param="model")
                self._loaded[name] = load_embedder(name, found[name], self._threads)
            return self._loaded[name]

    def find_static(self) -> StaticEmbedder | None:
        """The static model that heads build on."""
        for name, kind in self.list_kinds().items():
            if kind == "static":
                model = self.get_embedder(name)
                if isinstance(model, StaticEmbedder):
                    return model
        return None

    def load_encoders(self) -> Mapping[str, Embedder]:
        return {name: self.get_embedder(name) for name, kind in self.list_kinds().items() if kind == "onnx"}

    @property
    def steps(self) -> int:
        """Grows while a model computes."""
        return sum(model.steps for model in self._loaded.values())
