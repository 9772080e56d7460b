#!/usr/bin/env bash
# peft 0.21.2 (torch 2.13.0): `create_lorafa_optimizer` computes the gradient that LoRA-FA steps by, s^-2 g (A A^T)^-1, under a
# bfloat16 autocast of its own wherever bfloat16 is there, which it is on CPUs too: of a model in float32 that trains without
# autocast as well. The gradient of B loses 16 of its 24 bits, and nothing says so.
#
# Seen (rank 4 on a layer of 64 x 32, float32; the first step's gradient, from the optimizer's first moment):
#   relative error to float64:  peft 3.6e-03, the same product in float32 2.2e-07
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer

RANK, ALPHA, OUT, IN = 4, 8, 64, 32
torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False))
model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"]))
optimizer = create_lorafa_optimizer(model, r=RANK, lora_alpha=ALPHA, lr=1e-3)
layer = model.base_model.model[0]
A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
assert A.dtype == B.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")

torch.nn.functional.mse_loss(model(torch.randn(128, IN)), torch.randn(128, OUT)).backward()
gradient, scaling = B.grad.clone(), ALPHA / RANK
optimizer.step()
(state,) = (state for state in optimizer.state.values() if "exp_avg_B" in state)
found = state["exp_avg_B"] / (1 - 0.9)


def projected(dtype):
    return gradient.to(dtype) @ torch.linalg.pinv(A.detach().to(dtype) @ A.detach().to(dtype).mT) / scaling**2


exact = projected(torch.float64)
errors = [float((each.double() - exact).norm() / exact.norm()) for each in (found, projected(torch.float32))]
print("relative error to float64:  peft {:.1e}, the same product in float32 {:.1e}".format(*errors))
assert errors[0] > 1e-3 and errors[1] < 1e-5
PY
