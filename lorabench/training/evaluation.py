"""Forward passes, and what a model is worth on a split: of a run, of its untouched base, of any other model."""

from __future__ import annotations

import contextlib
import inspect
import math
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from lorabench.processes.distributed import ALONE, World
from lorabench.spec.run_spec import RunSpec
from lorabench.training.examples import RETAIN, Batch, Examples, collate
from lorabench.training.state import Training
from lorabench.training.stop import Diverged, Stop


def evaluate_base(training: Training, stop: Stop) -> None:
    """What the untouched base does on the tasks; a random prompt in front of it would be another model."""
    with training.meter.clock("evaluate"):
        model = training.model if training.spec.method.starts_at_base else training.base.untouched()
        found = evaluate_splits(training, ["validation", "retain"], stop, model)
    training.rows.append(found["validation"])
    training.metrics["base_valid_loss"] = found["validation"][-1]["valid_loss"]
    for retained in found["retain"]:
        training.metrics["retain_loss_before"] = retained["retain_loss"]


def evaluate_task(training: Training, stop: Stop) -> None:
    """What the model does on every task after training on one; after the last, on the other splits too."""
    is_last = training.stage == len(training.base.stages) - 1
    found = evaluate_splits(training, ["validation", *(["test", "retain"] if is_last else [])], stop)
    training.rows.append(found["validation"])
    if not is_last:
        return
    training.metrics |= found["validation"][-1]
    for tested in found["test"]:
        training.metrics |= tested
    for retained in found["retain"]:
        training.metrics["retain_loss_after"] = retained["retain_loss"]
        training.metrics["forgetting"] = retained["retain_loss"] - training.metrics["retain_loss_before"]
    last = training.losses[-max(1, training.spec.steps // 10) :]
    training.metrics["train_loss"] = sum(last) / len(last)


def evaluate_splits(
    training: Training, splits: list[str], stop: Stop, model: nn.Module | None = None
) -> dict[str, list[dict[str, float]]]:
    """Split -> its metrics on every task for `validation`, on the last task that has the split for the others."""
    found = {}
    for split in splits:
        having = [examples for examples in training.base.stages if examples.splits.get(split)]
        found[split] = [
            evaluate(training, examples, split, stop, model)
            for examples in (having if split == "validation" else having[-1:])
        ]
    return found


def evaluate(
    training: Training, examples: Examples, split: str, stop: Stop, model: nn.Module | None = None
) -> dict[str, float]:
    """Loss and metrics of a split, by their names in MEASURES; nothing where the split is empty.

    Of `model` where one is given.
    """
    found = metrics_of(model or training.model, training.spec, examples, split, stop, training.world)
    for name, value in found.items():
        if name.endswith("_loss") and not math.isfinite(value):
            raise Diverged(f"step {training.step}: {split} loss {value}")
    return found


@torch.no_grad()
def metrics_of(
    model: nn.Module,
    spec: RunSpec,
    examples: Examples,
    split: str,
    stop: Stop | None = None,
    world: World = ALONE,
) -> dict[str, float]:
    """`evaluate` of any model, as `spec` has it; the loss may be infinite. Ranks take the batches in turn."""
    device = next(model.parameters()).device
    task = RETAIN if split == "retain" else examples.task
    rows, size = examples.splits.get(split, []), spec.micro_batch_size or -(-spec.batch_size // world.size)
    if not rows:
        return {}
    model.eval()
    found: list[tuple[float, int, Any]] = []
    for first in range(0, len(rows), size * world.size):
        if stop is not None:
            stop.check()
        start = first + size * world.rank
        if start >= len(rows) and not world.is_sharded:
            continue
        batch = collate(rows[start : start + size] or rows[:1], examples.padding, device)
        with autocast(spec, device, world):
            logits = forward(model, batch)
        if start < len(rows):
            found.append((float(task.loss(logits, batch)), task.count(batch), task.score(logits, batch)))
    if world.is_sharded:
        model.reshard()  # else its outermost weights stay whole until the next step
    turns = zip_longest(*world.gather(found))
    total, count, scores = 0.0, 0, []
    for each in (each for turn in turns for each in turn if each is not None):
        total, count = total + each[0], count + each[1]
        scores.append(each[2])
    prefix = {"validation": "valid"}.get(split, split)
    metrics = task.metrics(total / count, scores)
    return {f"{prefix}_{key}": value for key, value in metrics.items() if value is not None}


def forward(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits (n, classes), or (n, t, vocabulary) of the batch's own positions: virtual tokens in front have none."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch.get("attention_mask")}
    if "token_type_ids" in batch and _takes_segments(model):
        inputs["token_type_ids"] = batch["token_type_ids"]
    logits = model(**inputs).logits
    length = batch["input_ids"].shape[1]
    return logits[:, -length:] if logits.ndim == 3 and logits.shape[1] > length else logits


def _takes_segments(model: Any) -> bool:
    """Whether the base tells the texts of a pair apart by segments, of which a RoBERTa has a single one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    is_argument = "token_type_ids" in inspect.signature(base.forward).parameters
    return is_argument and getattr(base.config, "type_vocab_size", 2) > 1


def autocast(spec: RunSpec, device: torch.device, world: World = ALONE) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 where the spec says so. Of shared-out weights its cache would keep all, cast, until it ends."""
    enabled = spec.dtype == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=not world.is_sharded)
