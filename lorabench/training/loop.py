"""The steps of one task: each is forward, backward and update, with the meter around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from lorabench.processes.distributed import Gradients, whole
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.task import Example, Task
from lorabench.store.claim import Hold
from lorabench.store.steps import StepLog
from lorabench.training.evaluation import evaluate
from lorabench.training.examples import Batch, Order, collate
from lorabench.training.flops import Shape, num_positions
from lorabench.training.meter import Shapes
from lorabench.training.passes import autocast, forward
from lorabench.training.state import Training
from lorabench.training.stop import Diverged, Stop, Stopped

CPU = torch.device("cpu")  # where batches are made and counted: to count on a GPU would wait for it
FLUSH_EVERY = 10
"""Steps between two looks at the loss: each makes a GPU wait."""


@dataclass(frozen=True, kw_only=True)
class Saves:
    """What a run writes of itself while it trains."""

    checkpoint: Callable[[], None]
    snapshot: Callable[[], None]
    """Keeps ΔW; may leave the model in evaluation mode, and changes nothing else of the training."""


def train(training: Training, log: StepLog, stop: Stop, saves: Saves, hold: Hold) -> None:
    """Take the remaining steps of the task being trained. Raises Stopped (with a checkpoint written) or Diverged."""
    with training.meter.training():
        _steps(training, log, stop, saves, hold)


def _steps(training: Training, log: StepLog, stop: Stop, saves: Saves, hold: Hold) -> None:
    spec, model, meter = training.spec, training.model, training.meter
    batches, steps = Batches(training), Losses(training, log, hold)
    gradients = Gradients(batches.parameters, training.world)
    model.train()
    while training.task_step < spec.steps:
        try:
            stop.check()
            if evaluation_due(training):
                steps.flush()
                with meter.clock("evaluate"):
                    log.evaluation(training.step, evaluate(training, training.examples, "validation", stop))
                training.evaluated = training.step
                model.train()
        except Stopped:
            steps.flush()
            saves.checkpoint()
            raise
        parts, work = batches.next()
        lr_share = set_lr(training)
        with meter.step(*work), meter.live_tensors(model, training.optimizer):
            with meter.phase("forward_backward"):
                loss = forward_backward(training, parts, work.labels)
                gradients.sum()
            with meter.phase("optimizer"):
                norm = update(training, batches.parameters)
        training.step += 1
        steps.add(loss, norm, spec.lr * lr_share)
        if training.step % FLUSH_EVERY == 0 or training.task_step == spec.steps:
            steps.flush()
        if snapshot_due(training):
            steps.flush()
            saves.snapshot()
            model.train()
        if training.world.any(log.checkpoint_due()):
            steps.flush()
            saves.checkpoint()


class Work(NamedTuple):
    """What there is to do in a step, over all ranks; `shapes` are this rank's passes."""

    tokens: int
    padded: int
    labels: int
    shapes: Shapes


class Batches:
    """What the steps of a task are made of, in the run's own order of the data: this rank's share of each batch."""

    def __init__(self, training: Training):
        spec, examples = training.spec, training.examples
        self.training, self.rows = training, examples.splits["train"]
        self.parameters = [p for group in training.optimizer.param_groups for p in group["params"]]
        self._order = Order(len(self.rows), spec.batch_size, spec.seed, training.stage)

    def next(self) -> tuple[list[Batch], Work]:
        """The parts of the next step's batch, on the CPU, and what there is to do in them, over all ranks."""
        training = self.training
        examples, world = training.examples, training.world
        batch = [self.rows[i] for i in world.share(self._order.indices(training.task_step))]
        chunks = [batch[i : i + training.micro] for i in range(0, len(batch), training.micro)]
        parts = [collate(chunk, examples.padding, CPU) for chunk in chunks]
        task = examples.task
        shapes = tuple(batch_shape(part, task) for part in parts)
        own = map(task.count, parts), (example_length(row, task) for row in batch), map(num_positions, shapes)
        labels, tokens, padded = map(int, world.sum([sum(each) for each in own]))
        return parts, Work(tokens=tokens, padded=padded, labels=labels, shapes=shapes)


def forward_backward(training: Training, parts: list[Batch], labels: int) -> torch.Tensor:
    """Add this rank's gradients of the batch's mean loss over its labels; this rank's part of that loss."""
    spec, model, device = training.spec, training.model, training.meter.device
    task, loss = training.examples.task, torch.zeros((), device=device)
    for part in parts:
        part = {key: tensor.to(device, non_blocking=True) for key, tensor in part.items()}
        with autocast(spec, device, training.world):
            part_loss = task.loss(forward(model, part), part) / max(labels, 1)
        part_loss.backward()
        loss += part_loss.detach()
    for _ in range(training.idle_passes(len(parts))):
        idle = collate(training.examples.splits["train"][:1], training.examples.padding, device)
        with autocast(spec, device, training.world):
            (forward(model, idle).sum() * 0).backward()
    penalty = spec.method.penalty(model)
    if penalty is not None and training.world.is_first:
        penalty.backward()
    return loss


def update(training: Training, parameters: list[nn.Parameter]) -> torch.Tensor:
    """Clip, step, and what the method does after it; the gradient's norm before clipping."""
    limit = math.inf if training.spec.clip == "none" else training.spec.clip
    norm = whole(nn.utils.clip_grad_norm_(parameters, limit))
    training.optimizer.step()
    training.spec.method.after_step(training.model, training.step)
    training.optimizer.zero_grad()
    return norm


def set_lr(training: Training) -> float:
    """The next step's learning rates, as a share of their peaks."""
    share = schedule(training.spec, training.task_step)
    for group in training.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share
    return share


def schedule(spec: RunSpec, step: int) -> float:
    """The learning rate of a task's step (0, 1, …) as a share of its peak: linear warm-up, then decay to zero."""
    warm = math.ceil(spec.warmup * spec.steps - 1e-9)  # 0.07 * 100 is a little over 7
    if step < warm:
        return (step + 1) / warm
    if spec.schedule == "constant":
        return 1.0
    done = (step - warm) / max(1, spec.steps - warm)
    return 1 - done if spec.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class Losses:
    """The losses of the last steps, left on the device until they are looked at."""

    training: Training
    log: StepLog
    hold: Hold
    pending: list[tuple[int, torch.Tensor, torch.Tensor, float]] = field(default_factory=list)

    def add(self, loss: torch.Tensor, norm: torch.Tensor, lr: float) -> None:
        self.pending.append((self.training.step, loss, norm, lr))

    def flush(self) -> None:
        """Read them off the device and log them. Raises Diverged where one is not finite, Lost if the claim is."""
        training, progress = self.training, self.hold.progress
        self.hold.check()
        training.meter.flush()
        losses = training.world.sum([float(loss) for _, loss, _, _ in self.pending])
        for loss, (step, _, norm, lr) in zip(losses, self.pending, strict=True):
            row: dict[str, Any] = {"step": step, "loss": loss, "grad_norm": float(norm), "lr": lr}
            self.log.step(row)
            if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                raise Diverged(f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}")
            training.losses.append(row["loss"])
        if self.pending:
            throughput = training.meter.throughput()
            progress |= {"step": training.step, "loss": training.losses[-1]}
            progress |= {k: v for k, v in throughput.items() if k in ("tokens_per_second", "step_seconds_median")}
        self.pending.clear()
        self.log.flush()


def example_length(example: Example, task: Task) -> int:
    """Tokens that go through the model: what is read, and what a decoder of its own is to write."""
    return sum(len(example[key]) for key in task.sequences)


def batch_shape(batch: Batch, task: Task) -> Shape:
    """Padding included."""
    return (len(batch["input_ids"]), *(batch[key].shape[1] for key in task.sequences))


def evaluation_due(training: Training) -> bool:
    """Whether the periodic evaluation of this step is still to do; a resumed run does what it was stopped in."""
    every = training.spec.eval_every
    return bool(every and training.task_step % every == 0 and training.step != training.evaluated)


def snapshot_due(training: Training) -> bool:
    """Whether ΔW is to be kept as it is after this step; after the last one `updates/` holds it."""
    every = training.spec.snapshot_every
    return bool(every and training.step % every == 0 and training.step < training.spec.total_steps)
