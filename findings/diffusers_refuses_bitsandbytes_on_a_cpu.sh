#!/usr/bin/env bash
# diffusers 0.42.1 refuses to load a model with 4-bit or 8-bit weights where there is no GPU ("No GPU found. A GPU is needed
# for quantization."), although bitsandbytes 0.50.2 quantizes and computes on a CPU, forward and backward: the same layer,
# put into the model's place by hand, works, and transformers loads its models so.
# What avoids it: load the model in full, put `bitsandbytes.nn.Linear4bit` in the place of its linear layers, and move it.
#
# Seen (Python 3.11): RuntimeError for both widths; by hand an output within 0.2 of the full model's spread, and a gradient
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 bitsandbytes==0.50.2 transformers==5.23.0 \
  accelerate==1.15.0 numpy
cat >"$folder/quantize.py" <<'PY'
import sys

import bitsandbytes as bnb
import torch
from diffusers import BitsAndBytesConfig, UNet2DModel

torch.manual_seed(0)
size = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (64, 64), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8, "attention_head_dim": 32}
UNet2DModel(**size).save_pretrained(sys.argv[1])
for options in ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}):
    try:
        UNet2DModel.from_pretrained(sys.argv[1], quantization_config=BitsAndBytesConfig(**options))
        print("loads")
    except RuntimeError as error:
        print("RuntimeError" if "No GPU found" in str(error) else error)
model = UNet2DModel.from_pretrained(sys.argv[1])
sample = torch.randn(4, 1, 8, 8)
with torch.no_grad():
    wanted = model(sample, 10).sample
for name, module in list(model.named_modules()):
    if isinstance(module, torch.nn.Linear):
        new = bnb.nn.Linear4bit(module.in_features, module.out_features, compute_dtype=torch.float32, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
        new.bias = module.bias
        new.support_avx512bf16_for_cpu = False
        model.set_submodule(name, new)
model = model.to("cpu")
found = model(sample, 10).sample
found.square().mean().backward()
error = float((found - wanted).abs().max() / wanted.std())
print("by hand", 0 < error < 0.2, model.conv_in.weight.grad.norm() > 0)
PY
seen=$("$folder/venv/bin/python" "$folder/quantize.py" "$folder/unet" 2>/dev/null | tr '\n' ';')
echo "$seen"
[ "$seen" = "RuntimeError;RuntimeError;by hand True tensor(True);" ]
