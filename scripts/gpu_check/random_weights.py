"""A Llama of random weights, for speed and memory alone where no real model lies. Runs in vLLM's environment:

random_weights.py TARGET LAYERS HIDDEN INTERMEDIATE HEADS KV_HEADS TOKENIZER_FOLDER
"""

import shutil
import sys
from pathlib import Path

import torch  # type: ignore[import-not-found]
import transformers  # type: ignore[import-not-found]

target, tokenizer = Path(sys.argv[1]), Path(sys.argv[7])
layers, hidden, intermediate, heads, kv_heads = map(int, sys.argv[2:7])
known = transformers.AutoConfig.from_pretrained(tokenizer)
config = transformers.LlamaConfig(
    vocab_size=known.vocab_size,
    hidden_size=hidden,
    intermediate_size=intermediate,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    num_key_value_heads=kv_heads,
    max_position_embeddings=32_768,
    bos_token_id=known.bos_token_id,
    eos_token_id=known.eos_token_id,
    tie_word_embeddings=False,
)
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
with torch.device(device):
    model = transformers.LlamaForCausalLM(config)
target.mkdir(parents=True, exist_ok=True)
model.to("cpu").save_pretrained(target)
for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
    if (tokenizer / name).exists():
        shutil.copy(tokenizer / name, target / name)
