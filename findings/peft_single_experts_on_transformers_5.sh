#!/usr/bin/env bash
# PEFT 0.21.2 with transformers 5.23.0: adapters of single experts (Mixtral before transformers 5), loaded today.
#
# transformers 5 stacks the experts of a Mixtral: w1 and w3 become `gate_up_proj`, w2 `down_proj`. PEFT converts adapters
# of the old modules (`block_sparse_moe.experts.N.w1`) when it loads them. Held against s B A of each expert, that is
#   - exact for plain LoRA;
#   - √2 too large on w1 and w3 with use_rslora: r is doubled and α too, and s = α / √r counts that once too often;
#   - without any alpha_pattern on w1 or w3, in silence (one on w2 holds);
#   - a size mismatch (RuntimeError) with any rank_pattern on experts.
# What loads exactly in every case is the scale folded into B (α = r, no rsLoRA) and factors of all experts padded with
# zeros to one rank, which is `r`. Also: HiRA takes no notice of rank_pattern for a model's first adapter.
#
# Output seen:
#   plain: gate_up 1.0000, down 1.0000
#   rslora: gate_up 1.4142, down 1.0000
#   alpha_pattern of w1: 1.6667 for 1
#   rank_pattern of w1: RuntimeError
#   HiRA with rank_pattern 3: rank 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 safetensors==0.8.0
cat > "$folder/show.py" <<'PYTHON'
import json
import tempfile
import warnings

import torch
from peft import HiraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

warnings.simplefilter("ignore")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
MIXTRAL = MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=3)


def base():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MIXTRAL)


def ratios(**fields):
    """Norms of what PEFT changes over those of s B A: of w1, of w1 and w3, of w2."""
    tensors, want = {}, {}
    for expert in range(3):
        for leaf in ("w1", "w3", "w2"):
            rows, columns = (16, 24) if leaf == "w2" else (24, 16)
            r = fields.get("rank_pattern", {}).get(leaf, 2)
            alpha = fields.get("alpha_pattern", {}).get(leaf, 5)
            A, B = torch.randn(r, columns), torch.randn(rows, r)
            name = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{leaf}"
            tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
            want[expert, leaf] = alpha / (r**0.5 if fields.get("use_rslora") else r) * B @ A
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, f"{folder}/adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "target_modules": ["w1", "w2", "w3"]} | fields
        with open(f"{folder}/adapter_config.json", "w") as file:
            json.dump(config, file)
        tuned, before = PeftModel.from_pretrained(base(), folder).merge_and_unload(), base()
    names = [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    gate_up, down = ((tuned.get_parameter(n) - before.get_parameter(n)).detach() for n in names)
    w1, w3, w2 = (torch.stack([want[expert, leaf] for expert in range(3)]) for leaf in ("w1", "w3", "w2"))
    pairs = (gate_up[:, :24], w1), (gate_up, torch.cat([w1, w3], 1)), (down, w2)
    return [round(float(found.norm() / right.norm()), 4) for found, right in pairs]


torch.manual_seed(1)
_, plain, down = ratios()
print(f"plain: gate_up {plain:.4f}, down {down:.4f}")
_, rslora, down_rslora = ratios(use_rslora=True)
print(f"rslora: gate_up {rslora:.4f}, down {down_rslora:.4f}")
alpha, _, _ = ratios(alpha_pattern={"w1": 3})
print(f"alpha_pattern of w1: {alpha:.4f} for 1")
try:
    ratios(rank_pattern={"w1": 3})
    failed = "loads"
except RuntimeError as error:
    failed = type(error).__name__
print(f"rank_pattern of w1: {failed}")
llama = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
hira = get_peft_model(llama, HiraConfig(r=2, target_modules=["q_proj"], rank_pattern={"q_proj": 3}))
rank = hira.get_base_model().model.layers[0].self_attn.q_proj.r["default"]
print(f"HiRA with rank_pattern 3: rank {rank}")
seen = [plain, down, rslora, down_rslora, alpha, failed, rank]
assert seen == [1.0, 1.0, 1.4142, 1.0, 1.6667, "RuntimeError", 2], seen
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
