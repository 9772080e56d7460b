"""The steps of one task: each is forward, backward and update, with the meter around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lorabench.processes.distributed import Gradients
from lorabench.spec.run_spec import RunSpec
from lorabench.store.claim import Hold
from lorabench.store.steps import StepLog
from lorabench.training.evaluation import evaluate
from lorabench.training.state import Training
from lorabench.training.step import Asked, Own, Pass
from lorabench.training.stop import Diverged, Stop, Stopped

FLUSH_EVERY = 10
"""Steps between two looks at the loss: each makes a GPU wait."""


@dataclass(frozen=True, kw_only=True)
class Saves:
    """What a run writes of itself while it trains."""

    checkpoint: Callable[[], None]
    snapshot: Callable[[], None]
    """Keeps ΔW; may leave the model in evaluation mode, and changes nothing else of the training."""
    due: Callable[[], bool]
    """Whether it is time for a checkpoint."""


def train(training: Training, log: StepLog, stop: Stop, saves: Saves, hold: Hold) -> Asked:
    """Take the remaining steps of the task being trained. Raises Stopped (with a checkpoint written) or Diverged."""
    with training.meter.training():
        yield from _steps(training, log, stop, saves, hold)


def _steps(training: Training, log: StepLog, stop: Stop, saves: Saves, hold: Hold) -> Asked:
    spec, model, meter = training.spec, training.model, training.meter
    batches, steps = spec.objective.batches(training, stop.check), Losses(training, log, hold)
    parameters = [p for group in training.optimizer.param_groups for p in group["params"]]
    gradients = Gradients(parameters, training.world)
    model.train()
    while training.task_step < spec.steps:
        try:
            stop.check()
            if evaluation_due(training):
                steps.flush()
                hold.progress["phase"] = "evaluate"
                with meter.clock("evaluate"):
                    yield Own(training=training, splits=((training.examples, "validation"),))
                    log.evaluation(training.step, evaluate(training, training.examples, "validation", stop))
                hold.progress["phase"] = "train"
                training.evaluated = training.step
                model.train()
            parts, work = batches.next()
        except Stopped:
            steps.flush()
            yield Own(training=training)
            saves.checkpoint()
            raise
        lr_share = set_lr(training)
        with meter.step(*work), meter.live_tensors(model, training.optimizer):
            loss, norm = yield Pass(training=training, batches=batches, parts=parts, gradients=gradients)
        training.step += 1
        steps.add(loss, norm, spec.lr * lr_share, batches.about())
        if training.step % FLUSH_EVERY == 0 or training.task_step == spec.steps:
            steps.flush()
        if snapshot_due(training):
            steps.flush()
            yield Own(training=training)
            saves.snapshot()
            model.train()
        if training.world.any(saves.due()):
            steps.flush()
            yield Own(training=training)
            saves.checkpoint()


def set_lr(training: Training) -> float:
    """The next step's learning rates, as a share of their peaks."""
    share = schedule(training.spec, training.task_step) * training.spec.method.lr_share(training.step)
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
    pending: list[tuple[int, torch.Tensor, torch.Tensor, dict[str, float]]] = field(default_factory=list)

    def add(self, loss: torch.Tensor, norm: torch.Tensor, lr: float, about: dict[str, float]) -> None:
        self.pending.append((self.training.step, loss, norm, {"lr": lr} | about))

    def flush(self) -> None:
        """Read them off the device and log them. Raises Diverged where one is not finite, Lost if the claim is."""
        training, progress = self.training, self.hold.progress
        self.hold.check()
        training.meter.flush()
        losses = training.world.sum([float(loss) for _, loss, _, _ in self.pending])
        for loss, (step, _, norm, about) in zip(losses, self.pending, strict=True):
            row: dict[str, Any] = {"step": step, "loss": loss, "grad_norm": float(norm)} | about
            self.log.step(row)
            if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                raise Diverged(f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}")
            training.losses.append(row["loss"])
        if self.pending:
            throughput = training.meter.throughput()
            progress |= {"step": training.step, "loss": training.losses[-1]}
            shown = (f"{training.meter.unit}_per_second", "step_seconds_median")
            progress |= {k: v for k, v in throughput.items() if k in shown}
        self.pending.clear()
        self.log.flush()


def evaluation_due(training: Training) -> bool:
    """Whether the periodic evaluation of this step is still to do; a resumed run does what it was stopped in."""
    every = training.spec.eval_every
    return bool(every and training.task_step % every == 0 and training.step != training.evaluated)


def snapshot_due(training: Training) -> bool:
    """Whether ΔW is to be kept as it is after this step; after the last one `updates/` holds it."""
    every = training.spec.snapshot_every
    return bool(every and training.step % every == 0 and training.step < training.spec.total_steps)
