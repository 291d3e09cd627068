"""Other variants of a model's weights, made on this machine by llama.cpp's own quantiser.

From a quantised source nothing is won in quality: BF16 and Q8_0 keep what the source has, smaller forms lose more.
"""

import ctypes
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from appliance.errors import ConfigError, EngineFailed
from appliance.files import replacing_file
from appliance.llamacpp.binding import lib


@dataclass(frozen=True, slots=True)
class QuantisedForm:
    """One form of weights: llama.cpp's number of it, and bits a weight, the scales of its blocks included."""

    file_type: int
    bits: float


FORMS: Final[Mapping[str, QuantisedForm]] = MappingProxyType(
    {
        "f32": QuantisedForm(lib.LLAMA_FTYPE_ALL_F32, 32.0),
        "f16": QuantisedForm(lib.LLAMA_FTYPE_MOSTLY_F16, 16.0),
        "bf16": QuantisedForm(lib.LLAMA_FTYPE_MOSTLY_BF16, 16.0),
        "q8_0": QuantisedForm(lib.LLAMA_FTYPE_MOSTLY_Q8_0, 8.5),
        "q6_k": QuantisedForm(lib.LLAMA_FTYPE_MOSTLY_Q6_K, 6.5625),
        "q5_1": QuantisedForm(lib.LLAMA_FTYPE_MOSTLY_Q5_1, 6.0),
        "q5_0": QuantisedForm(lib.LLAMA_FTYPE_MOSTLY_Q5_0, 5.5),
        "q5_k_m": QuantisedForm(lib.LLAMA_FTYPE_MOSTLY_Q5_K_M, 5.7),
        "q4_1": QuantisedForm(lib.LLAMA_FTYPE_MOSTLY_Q4_1, 5.0),
        "q4_0": QuantisedForm(lib.LLAMA_FTYPE_MOSTLY_Q4_0, 4.5),
        "q4_k_m": QuantisedForm(lib.LLAMA_FTYPE_MOSTLY_Q4_K_M, 4.9),
    }
)
"""What can be derived."""

SPARE_BYTES: Final = 64 << 20
"""Left free on the disk, so that a derived file never starves the ledger beside it."""
_SMALL_FORM_MARGIN: Final = 1.25
"""Small forms keep the embeddings in a larger one; of SmolLM2-135M they are a fifth, and Q4_0 grows by as much."""
_LARGE_FORM_MARGIN: Final = 1.02
_LARGE_FORM_BITS: Final = 8.0


def estimate_bytes(parameters: int, variant: str) -> int:
    """About how large the file of `variant` becomes, on the safe side. Raises ConfigError for an unknown form."""
    bits = _form(variant).bits
    margin = _LARGE_FORM_MARGIN if bits >= _LARGE_FORM_BITS else _SMALL_FORM_MARGIN
    return int(parameters * bits / 8 * margin)


def derive_variant(source: Path, target: Path, variant: str, *, parameters: int, threads: int) -> None:
    """Write `variant` of the GGUF `source` to `target`, which appears whole or not at all.

    `parameters` of the model say beforehand whether the disk has room. Raises ConfigError for an unknown form,
    EngineFailed where the disk is too full or llama.cpp cannot convert.
    """
    form = _form(variant)
    target.parent.mkdir(parents=True, exist_ok=True)
    needed, free = estimate_bytes(parameters, variant), shutil.disk_usage(target.parent).free
    if needed + SPARE_BYTES > free:
        raise EngineFailed(
            f"{variant} takes about {needed:,} bytes and {target.parent} has {free:,} free, {SPARE_BYTES:,} of which "
            "stay free: make room, or choose a smaller variant"
        )
    params = lib.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.allow_requantize = threads, form.file_type, True
    try:
        with replacing_file(target) as part:
            code = lib.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(params))
            if code:
                raise EngineFailed(
                    f"llama.cpp cannot make {variant} from {source.name} (code {code}): choose another form"
                )
    except OSError as error:
        raise EngineFailed(f"{target} cannot be written: {error.strerror}") from error


def _form(variant: str) -> QuantisedForm:
    form = FORMS.get(variant)
    if form is None:
        raise ConfigError(f"no form of weights is called {variant!r}; there are {', '.join(FORMS)}")
    return form
