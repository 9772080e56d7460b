#!/usr/bin/env bash
# peft 0.21.2 (torch 2.13.0): `preprocess_corda` asks for a callback that runs the model on the sample data, and takes one
# example a pass only: a batch of two ends in an error of torch that names neither the batch nor CorDA. Its hook drops the
# first dimension where that is 1, and transposes what is left as a matrix.
#
# Seen:
#   batches of 1: done
#   batches of 2: RuntimeError: t() expects a tensor with <= 2 dimensions, but self is 3D
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PY'
import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda


def outcome(batch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False))
    config = LoraConfig(
        r=2, target_modules=["0"], init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm")
    )
    data = torch.randn(8, 16, 8)  # 8 examples of 16 tokens

    def run_model():
        for examples in data.split(batch):
            model(examples)

    try:
        preprocess_corda(model, config, run_model)
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    return "done"


found = {batch: outcome(batch) for batch in (1, 2)}
for batch, what in found.items():
    print(f"batches of {batch}: {what}")
assert found[1] == "done" and "t() expects a tensor with <= 2 dimensions" in found[2]
PY
