#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0, attention "sdpa"): examples laid end to end in one row, with positions that begin anew
# at each, are kept apart by a mask that the model makes of `position_ids`; but only where no cache is made. With the
# default `use_cache=True`, in training too, the second example sees the first, and nothing says so. OPT's examples see
# each other with `use_cache=False` as well: it makes its mask without the positions.
#
# Seen (largest difference between the second example's logits behind another one and by itself):
#   llama  use_cache=True: 0.24   use_cache=False: 0.00
#   gpt2   use_cache=True: 0.05   use_cache=False: 0.00
#   opt    use_cache=True: 0.09   use_cache=False: 0.09
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PY'
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

size = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
configs = {
    "llama": LlamaConfig(intermediate_size=64, max_position_embeddings=64, **size),
    "gpt2": GPT2Config(n_positions=64, bos_token_id=0, eos_token_id=0, **size),
    "opt": OPTConfig(ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64, **size),
}
torch.manual_seed(0)
first, second = torch.randint(3, 60, (1, 6)), torch.randint(3, 60, (1, 5))
positions = torch.cat([torch.arange(6), torch.arange(5)])[None]
expected = {"llama": (True, False), "gpt2": (True, False), "opt": (True, True)}
for name, config in configs.items():
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    found = []
    for use_cache in (True, False):
        with torch.no_grad():
            alone = model(second, use_cache=use_cache).logits
            both = model(torch.cat([first, second], 1), position_ids=positions, use_cache=use_cache).logits[:, 6:]
        found.append(float((alone - both).abs().max()))
    print(f"{name:6} use_cache=True: {found[0]:.2f}   use_cache=False: {found[1]:.2f}")
    assert tuple(difference > 0.01 for difference in found) == expected[name], name
PY
