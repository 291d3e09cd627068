"""The same weights in other variants, made by llama.cpp's own quantiser and kept beside the peers.

As a program: `python -m scripts.benchmarks.peers.variants SOURCE TARGET VARIANT`.
"""

import subprocess
import sys
from pathlib import Path

import llama_cpp.llama_cpp as lib

from scripts.benchmarks.peers.installing import ROOT, PeerMissing, Say, peers_folder

VARIANTS = {
    "q4_1": lib.LLAMA_FTYPE_MOSTLY_Q4_1,
    "q4_0": lib.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q8_0": lib.LLAMA_FTYPE_MOSTLY_Q8_0,
    "bf16": lib.LLAMA_FTYPE_MOSTLY_BF16,
}
MODEL = "smollm2-135m-instruct"
SOURCE_VARIANT = "q4_1"


def source_model(given: Path | None) -> Path:
    """The GGUF that all variants are made from: what was named, or the embedded model, pulled once."""
    if given is not None:
        return given.resolve()
    path = peers_folder() / "models" / MODEL / f"{SOURCE_VARIANT}.gguf"
    if not path.exists():
        command = [sys.executable, "-m", "appliance", "models", "pull", MODEL, "--data-dir", str(peers_folder())]
        subprocess.run(command, cwd=ROOT, check=True)
    return path


def variant_file(source: Path, variant: str, say: Say) -> Path:
    """The file of `variant`, made from `source` where it does not lie there yet."""
    if variant == SOURCE_VARIANT:
        return source
    stamp = f"{source.stat().st_size}-{int(source.stat().st_mtime)}"
    path = peers_folder() / "variants" / f"{source.stem}-{stamp}-{variant}.gguf"
    if not path.exists():
        say(f"making {variant} of {source.name} (once)")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.part")
        command = [sys.executable, "-m", "scripts.benchmarks.peers.variants", str(source), str(unfinished), variant]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PeerMissing(f"{variant} cannot be made of {source}: {done.stderr.strip()[-300:]}")
        unfinished.rename(path)
    return path


def main() -> None:
    source, target, variant = sys.argv[1:]
    params = lib.llama_model_quantize_default_params()
    params.ftype = VARIANTS[variant]
    params.allow_requantize = True
    if lib.llama_model_quantize(source.encode(), target.encode(), params):
        raise SystemExit(f"llama.cpp could not make {variant} of {source}")


if __name__ == "__main__":
    main()
