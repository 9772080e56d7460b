"""The training loop, and evaluation."""

from __future__ import annotations

import contextlib
import inspect
import math
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from lorabench.processes.distributed import ALONE, Gradients, World, whole
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.task import Example
from lorabench.store.claim import Hold
from lorabench.store.steps import StepLog
from lorabench.training.examples import RETAIN, Batch, Examples, Order, collate
from lorabench.training.state import Diverged, Stop, Stopped, Training

CPU = torch.device("cpu")  # where batches are made and counted: to count on a GPU would wait for it
FLUSH_EVERY = 10
"""Steps between two looks at the loss: each makes a GPU wait."""


@dataclass(frozen=True, kw_only=True)
class Saves:
    """What a run writes of itself while it trains."""

    checkpoint: Callable[[], None]
    snapshot: Callable[[], None]
    """Keeps ΔW; may leave the model in evaluation mode, and changes nothing else of the training."""


def train(training: Training, examples: Examples, log: StepLog, stop: Stop, saves: Saves, hold: Hold) -> None:
    """Take the remaining steps of the task being trained. Raises Stopped (with a checkpoint written) or Diverged."""
    spec, model, meter, world = training.spec, training.model, training.meter, training.world
    task, device = examples.task, meter.device
    parameters = [p for group in training.optimizer.param_groups for p in group["params"]]
    gradients = Gradients(parameters, world)
    order = Order(len(examples.splits["train"]), spec.batch_size, spec.seed, training.stage)
    micro = spec.micro_batch_size or spec.batch_size
    model.train()
    pending: list[tuple[int, torch.Tensor, torch.Tensor, float]] = []
    while training.task_step < spec.steps:
        try:
            stop.check()
            if evaluation_due(training):
                flush(training, pending, log, hold)
                with meter.clock("evaluate"):
                    log.evaluation(training.step, evaluate(training, examples, "validation", stop))
                training.evaluated = training.step
                model.train()
        except Stopped:
            flush(training, pending, log, hold)
            saves.checkpoint()
            raise
        batch = [examples.splits["train"][i] for i in world.share(order.indices(training.task_step))]
        parts = [collate(batch[i : i + micro], examples.padding, CPU) for i in range(0, len(batch), micro)]
        own = [task.count(part) for part in parts], map(example_length, batch), map(batch_length, parts)
        count, tokens, padded = map(int, world.sum([sum(each) for each in own]))
        lr_share = schedule(spec, training.task_step)
        for group in training.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_share
        shapes = tuple(map(batch_shape, parts))
        with meter.step(tokens, padded, count, shapes), meter.live_tensors(model, training.optimizer):
            loss = torch.zeros((), device=device)
            with meter.phase("forward_backward"):
                for part in parts:
                    part = {key: tensor.to(device, non_blocking=True) for key, tensor in part.items()}
                    with autocast(spec, device, world):
                        part_loss = task.loss(forward(model, part), part) / max(count, 1)
                    part_loss.backward()
                    loss += part_loss.detach()
                for _ in range(training.idle_passes(len(parts), micro)):
                    idle = collate(examples.splits["train"][:1], examples.padding, device)
                    with autocast(spec, device, world):
                        (forward(model, idle).sum() * 0).backward()
                penalty = spec.method.penalty(model)
                if penalty is not None and world.is_first:
                    penalty.backward()
                gradients.sum()
            with meter.phase("optimizer"):
                limit = math.inf if spec.clip == "none" else spec.clip
                norm = whole(nn.utils.clip_grad_norm_(parameters, limit))
                training.optimizer.step()
                spec.method.after_step(model, training.step)
                training.optimizer.zero_grad()
        training.step += 1
        pending.append((training.step, loss, norm, spec.lr * lr_share))
        if training.step % FLUSH_EVERY == 0 or training.task_step == spec.steps:
            flush(training, pending, log, hold)
        if snapshot_due(training):
            flush(training, pending, log, hold)
            saves.snapshot()
            model.train()
        if world.any(log.checkpoint_due()):
            flush(training, pending, log, hold)
            saves.checkpoint()


def example_length(example: Example) -> int:
    return len(example["input_ids"])


def batch_shape(batch: Batch) -> tuple[int, int]:
    n, t = batch["input_ids"].shape
    return n, t


def batch_length(batch: Batch) -> int:
    """Padding included."""
    return batch["input_ids"].numel()


def evaluation_due(training: Training) -> bool:
    """Whether the periodic evaluation of this step is still to do; a resumed run does what it was stopped in."""
    every = training.spec.eval_every
    return bool(every and training.task_step % every == 0 and training.step != training.evaluated)


def snapshot_due(training: Training) -> bool:
    """Whether ΔW is to be kept as it is after this step; after the last one `updates/` holds it."""
    every = training.spec.snapshot_every
    return bool(every and training.step % every == 0 and training.step < training.spec.total_steps)


def flush(training: Training, pending: list[Any], log: StepLog, hold: Hold) -> None:
    """Read the losses of the last steps off the device, log them, and stop if one is not finite."""
    hold.check()
    training.meter.flush()
    losses = training.world.sum([float(loss) for _, loss, _, _ in pending])
    for loss, (step, _, norm, lr) in zip(losses, pending, strict=True):
        row = {"step": step, "loss": loss, "grad_norm": float(norm), "lr": lr}
        log.step(row)
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise Diverged(f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}")
        training.losses.append(row["loss"])
    if pending:
        throughput = training.meter.throughput()
        hold.progress |= {"step": training.step, "loss": training.losses[-1]}
        hold.progress |= {k: v for k, v in throughput.items() if k in ("tokens_per_second", "step_seconds_median")}
    pending.clear()
    log.flush()


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


def schedule(spec: RunSpec, step: int) -> float:
    """The learning rate of a task's step (0, 1, …) as a share of its peak: linear warm-up, then decay to zero."""
    warm = math.ceil(spec.warmup * spec.steps - 1e-9)  # 0.07 * 100 is a little over 7
    if step < warm:
        return (step + 1) / warm
    if spec.schedule == "constant":
        return 1.0
    done = (step - warm) / max(1, spec.steps - warm)
    return 1 - done if spec.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def autocast(spec: RunSpec, device: torch.device, world: World = ALONE) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 where the spec says so. Of shared-out weights its cache would keep all, cast, until it ends."""
    enabled = spec.dtype == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=not world.is_sharded)


@contextlib.contextmanager
def stop_on_signals(stop: Stop) -> Iterator[None]:
    """SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 (SLURM's warning) end the run at its next step."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, _frame: object) -> None:
        stop.reason = stop.reason or signal.Signals(number).name

    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    before = {kind: signal.signal(kind, handler) for kind in kinds}
    try:
        yield
    finally:
        for kind, old in before.items():
            signal.signal(kind, old)
