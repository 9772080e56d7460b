#!/usr/bin/env bash
# PEFT 0.21.2 on transformers 5.23.0: a regular expression for `target_modules` that names one block of a Qwen3-MoE (or
# Mixtral, OLMoE, DeepSeek-V3 …) puts LoRA on every block. For those model types PEFT translates the targets of
# transformers 4 (`gate_proj` …) to the stacked experts of transformers 5, and on the way a regular expression becomes the
# last words of the names that it fits. In a list, full names stay as they are, but `….gate_proj` of a dense layer or of a
# shared expert of DeepSeek-V3 becomes all stacked experts of all blocks, and that layer itself has no LoRA.
# Both are silent. On Qwen2-MoE, Llama and others neither happens.
#
# Seen (torch 2.13.0):
#   llama      expression for block 1 -> blocks [1]
#   qwen3_moe  expression for block 1 -> blocks [0, 1]
#   deepseek_v3 layers.0.mlp.gate_proj, up_proj -> ['model.layers.1.mlp.experts']
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PY'
import re
import warnings

import torch
import transformers as t
from peft import LoraConfig, get_peft_model

warnings.simplefilter("ignore")
plain = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
experts = dict(moe_intermediate_size=16, num_experts_per_tok=2)
configs = {
    "llama": t.LlamaConfig(**plain),
    "qwen3_moe": t.Qwen3MoeConfig(num_experts=4, num_key_value_heads=2, head_dim=8, **plain, **experts),
    "deepseek_v3": t.DeepseekV3Config(
        n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=12, kv_lora_rank=8,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4, **plain, **experts,
    ),
}


def attached(name, targets):
    with torch.device("meta"):
        model = t.AutoModelForCausalLM.from_config(configs[name])
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    names = (key for key, module in tuned.named_modules() if hasattr(module, "lora_A") and "base_layer" not in key)
    return sorted(key.removeprefix("base_model.model.") for key in names)


seen = {}
for name in ("llama", "qwen3_moe"):
    found = attached(name, r"model\.layers\.1\.self_attn\.q_proj")
    seen[name] = sorted({int(re.search(r"layers\.(\d+)", key)[1]) for key in found})
    print(name, "expression for block 1 -> blocks", seen[name])
seen["deepseek_v3"] = attached("deepseek_v3", [f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "up")])
print("deepseek_v3 layers.0.mlp.gate_proj, up_proj ->", seen["deepseek_v3"])
assert seen == {"llama": [1], "qwen3_moe": [0, 1], "deepseek_v3": ["model.layers.1.mlp.experts"]}, seen
PY
