"""A GGUF as a folder of BF16 safetensors. Runs in vLLM's environment: `convert.py SOURCE TARGET`."""

import sys
from pathlib import Path

import torch  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # type: ignore[import-not-found]


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    named = {"gguf_file": source.name}
    AutoTokenizer.from_pretrained(source.parent, **named).save_pretrained(target)
    # Packed weights cannot be saved.
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, **named, dtype=torch.bfloat16, quantization_config=plain
    )
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)


if __name__ == "__main__":
    main()
