"""What a method makes of training data before the first step, for those that begin from data (EVA, CorDA, LoRA-GA)."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from lorabench.spec.run_spec import RunSpec
from lorabench.training.examples import Examples, Order, collate
from lorabench.training.passes import autocast, forward


def start_from_data(spec: RunSpec, model: nn.Module, examples: Examples) -> str:
    """Let the method begin from the first examples of the run's own order; what it was given, empty if it asks for
    none. Each is a pass by itself, so that no padding is among what a layer is given."""
    rows = examples.splits["train"]
    wanted = min(spec.method.num_start_examples, len(rows))
    if not wanted:
        return ""
    chosen = [rows[index] for index in Order(len(rows), wanted, spec.seed).indices(0)]
    device, task = next(model.parameters()).device, examples.task

    def loss(row: int) -> torch.Tensor:
        batch = collate([chosen[row]], examples.padding, device)
        with autocast(spec, device):
            return task.loss(forward(model, batch), batch) / max(task.count(batch), 1)

    model.eval()
    spec.method.begin_from_data(model, [partial(loss, row) for row in range(wanted)])
    tokens = "" if task.unit == "images" else f", {sum(len(row['input_ids']) for row in chosen):,} tokens"
    return f"from {wanted} examples of the training split{tokens}, the first in the order of seed {spec.seed}"
