#!/usr/bin/env bash
# torchtune 0.6.1 (torchao 0.10.0) with peft 0.21.2 and transformers 5.23.0: DoRA that torchtune exports in PEFT's format.
#
# torchtune has the rows of q and k in the order of its own rotary embedding. `tune_to_peft_adapter_weights`, with which
# its checkpointer writes `adapter_model.safetensors`, puts the rows of lora_B back into Hugging Face's order, and leaves
# DoRA's magnitudes, one number a row, in torchtune's. Nor does the `adapter_config.json` that it writes say use_dora, so
# that PEFT leaves the magnitudes out altogether. Loaded with use_dora = true, the other layers are exact:
#
# Output seen (relative error of PEFT's merged weight against torchtune's own, in Hugging Face's order):
#   q_proj 0.791, k_proj 0.016, v_proj 0.000, down_proj 0.000
#   q_proj with its magnitudes put into the order of the rows 0.000
# What is to be done with such an adapter: reorder the magnitudes of q and k as the rows, and set use_dora.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 safetensors==0.8.0
"$folder/venv/bin/pip" install --quiet --no-deps torchtune==0.6.1 torchao==0.10.0
"$folder/venv/bin/pip" install --quiet omegaconf tqdm psutil sentencepiece tiktoken blobfile tokenizers kagglehub datasets
cat > "$folder/export.py" <<'PYTHON'
import sys

import torch
from safetensors.torch import save_file
from torchtune.models.convert_weights import tune_to_hf, tune_to_peft_adapter_weights
from torchtune.models.llama3 import lora_llama3
from torchtune.modules.peft import get_adapter_params, get_merged_lora_ckpt

SIZES = {"vocab_size": 10, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 8, "max_seq_len": 8,
         "intermediate_dim": 12}
HEADS = {"num_heads": 2, "num_kv_heads": 1, "dim": 8}

torch.manual_seed(0)
model = lora_llama3(["q_proj", "k_proj", "v_proj"], apply_lora_to_mlp=True, lora_rank=2, lora_alpha=5.0, use_dora=True,
                    **SIZES)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.normal_()
adapter = {name: tensor.detach().clone() for name, tensor in get_adapter_params(model).items()}
state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
base = {name: t for name, t in state.items() if "lora_" not in name and "magnitude" not in name}
found = {
    "merged": tune_to_hf(get_merged_lora_ckpt({**state}, rank=2, alpha=5.0), **HEADS),
    "exported": tune_to_peft_adapter_weights({**adapter}, **HEADS),
    "base": tune_to_hf(base, **HEADS),
}
for name, tensors in found.items():
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, f"{sys.argv[1]}/{name}.safetensors")
PYTHON
cat > "$folder/show.py" <<'PYTHON'
import json
import sys
import tempfile
import warnings
from pathlib import Path

from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")
LAYERS = {"q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
          "down_proj": "mlp.down_proj"}
PREFIX = "base_model.model.model.layers.0."
base, merged, exported = (load_file(f"{sys.argv[1]}/{name}.safetensors") for name in ("base", "merged", "exported"))


def error(tensors, layer):
    """Of PEFT's merged weight."""
    config = LlamaConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, vocab_size=10, tie_word_embeddings=False)
    llama = LlamaForCausalLM(config)
    llama.load_state_dict(base)
    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 5.0, "target_modules": targets, "use_dora": True}
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{folder}/adapter_model.safetensors")
        Path(folder, "adapter_config.json").write_text(json.dumps(told))
        tuned = PeftModel.from_pretrained(llama, folder).merge_and_unload()
    name = f"model.layers.0.{layer}.weight"
    return float((tuned.get_parameter(name) - merged[name]).norm() / merged[name].norm())


errors = {name: error(exported, layer) for name, layer in LAYERS.items()}
print(", ".join(f"{name} {value:.3f}" for name, value in errors.items()))
magnitude = next(name for name in exported if name.startswith(f"{PREFIX}self_attn.q_proj.lora_magnitude"))
reordered = exported[magnitude].view(2, -1, 2).transpose(1, 2).flatten()
put_right = error(exported | {magnitude: reordered}, LAYERS["q_proj"])
print(f"q_proj with its magnitudes put into the order of the rows {put_right:.3f}")
assert min(errors["q_proj"], errors["k_proj"]) > 1e-3, errors
assert max(errors["v_proj"], errors["down_proj"], put_right) < 1e-4, (errors, put_right)
PYTHON
"$folder/venv/bin/python" "$folder/export.py" "$folder"
"$folder/venv/bin/pip" uninstall --quiet --yes torchao  # of which peft wants a later version than torchtune
"$folder/venv/bin/python" "$folder/show.py" "$folder"
