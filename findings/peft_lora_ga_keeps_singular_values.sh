#!/usr/bin/env bash
# peft 0.21.2 (torch 2.13.0): `init_lora_weights="lora_ga"` with the default config (direction "ArB2r", scale "stable") sets
# B to singular vectors of the gradient times their singular values, and A to singular vectors as they are. The paper
# (Wang et al. 2024, LoRA-GA) and its authors' code scale both factors by m^(1/4) / gamma^(1/2) and leave the singular
# values out, so that the start does not depend on the size of the loss. Here it does: a loss four times as large (a sum over
# examples for a mean, say) makes B four times as large.
#
# Seen (rank 4 on a layer of 64 x 32, gamma 16; the norms of the columns of B and the rows of A; in the paper all are 0.7071):
#   the loss:        B 0.0376 0.0354 0.0338 0.0326   A 1.0000 1.0000 1.0000 1.0000
#   the loss, by 4:  B 0.1503 0.1414 0.1351 0.1306   A 1.0000 1.0000 1.0000 1.0000
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PY'
import torch
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga

GAMMA, RANK, OUT, IN = 16, 4, 64, 32


def started(factor):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False))
    inputs, targets = torch.randn(128, IN), torch.randn(128, OUT)

    def train_step():
        (factor * torch.nn.functional.mse_loss(model(inputs), targets)).backward()

    ga = LoraGAConfig(stable_gamma=GAMMA)
    config = LoraConfig(r=RANK, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=ga)
    preprocess_loraga(model, config, train_step)
    layer = get_peft_model(model, config).base_model.model[0]
    return layer.lora_B["default"].weight.detach().norm(dim=0), layer.lora_A["default"].weight.detach().norm(dim=1)


paper = OUT**0.25 / GAMMA**0.5
print(f"in the paper: all {paper:.4f}")
found = {factor: started(factor) for factor in (1, 4)}
for factor, (columns, rows) in found.items():
    text = ["B", *(f"{norm:.4f}" for norm in columns), "  A", *(f"{norm:.4f}" for norm in rows)]
    print({1: "the loss:       ", 4: "the loss, by 4: "}[factor], *text)
torch.testing.assert_close(found[4][0], 4 * found[1][0], rtol=1e-3, atol=0)
assert all(torch.allclose(rows, torch.ones(RANK), atol=1e-4) for _, rows in found.values())
assert not torch.isclose(found[1][0], torch.tensor(paper), rtol=0.1).any()
PY
