#!/usr/bin/env bash
# transformers 5.23.0 writes a ViT's weights under other names than the model has: the file holds
# `vit.encoder.layer.0.attention.attention.query.weight`, the model's own parameter is
# `vit.layers.0.attention.q_proj.weight`. Both ways it maps them by itself, so that nothing shows until a file is read next
# to the model: an adapter of PEFT, whose keys and `target_modules` are the model's names, finds no weight of that name in
# the base's file, and a script that subtracts two checkpoints speaks of layers that the model does not have.
# What avoids it: read names through `from_pretrained`, or map them as transformers does.
#
# Seen (Python 3.11): of the 12 matrices of two blocks the file has none under the model's name
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 numpy
cat >"$folder/names.py" <<'PY'
import sys

from safetensors import safe_open
from transformers import ViTConfig, ViTForImageClassification

model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, hidden_size=16, intermediate_size=32,
                                            num_hidden_layers=2, num_attention_heads=2))
model.save_pretrained(sys.argv[1])
with safe_open(f"{sys.argv[1]}/model.safetensors", "pt") as file:
    written = set(file.keys())
own = {name for name, p in model.named_parameters() if ".layer" in name and p.ndim == 2}
print(len(own), len(own & written), sorted(own)[0], sorted(n for n in written if "query.weight" in n)[0])
PY
seen=$("$folder/venv/bin/python" "$folder/names.py" "$folder/vit" 2>/dev/null)
echo "$seen"
[ "$seen" = "12 0 vit.layers.0.attention.k_proj.weight vit.encoder.layer.0.attention.attention.query.weight" ]
