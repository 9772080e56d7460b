"""What a run asks of the model that it rides on, and the answer where it has that for itself.

A run is a generator: it does all that is its own (data order, logs, evaluation, checkpoints, its record), and yields
where it needs a pass. So the same run is computed alone or, as `lorabench.training.pack` has it, with others in one.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from lorabench.processes.distributed import Gradients, whole
from lorabench.training.batches import Batches
from lorabench.training.examples import Batch, Examples, collate, moved
from lorabench.training.passes import autocast, forward
from lorabench.training.state import Training


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Forward, backward and update of one step; sent back are the loss, and the gradient's norm before clipping."""

    training: Training
    batches: Batches
    parts: list[Batch]
    """On the CPU."""
    gradients: Gradients

    def alone(self) -> tuple[torch.Tensor, torch.Tensor]:
        with self.training.meter.phase("forward_backward"):
            loss = forward_backward(self.training, self.parts, self.batches)
            self.gradients.sum()
        with self.training.meter.phase("optimizer"):
            return loss, update(self.training)


@dataclass(frozen=True, kw_only=True)
class Own:
    """From here to the next request the run looks at its own model and optimizer, or changes them.

    `splits` are what it will evaluate first.
    """

    training: Training
    splits: tuple[tuple[Examples, str], ...] = ()

    def alone(self) -> None:
        pass  # they are always its own


T = TypeVar("T")
Asked = Generator[Pass | Own, Any, None]
"""What a part of a run yields."""


def alone(run: Generator[Pass | Own, Any, T], request: Pass | Own | None = None) -> T:
    """Carry a run out that has its model for itself, from the request on that it waits for; what it returns."""
    try:
        request = request or next(run)
        while True:
            try:
                answer = request.alone()
            except BaseException as error:  # it is the run's: that has to say what becomes of it
                request = run.throw(error)
            else:
                request = run.send(answer)
    except StopIteration as end:
        return end.value


def forward_backward(training: Training, parts: list[Batch], batches: Batches) -> torch.Tensor:
    """Add this rank's gradients of the step's loss; this rank's part of that loss."""
    spec, model, device = training.spec, training.model, training.meter.device
    loss = torch.zeros((), device=device)
    for part in parts:
        part = moved(part, device)
        with autocast(spec, device, training.world):
            part_loss = batches.loss(model, part)
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


def update(training: Training) -> torch.Tensor:
    """Clip, step, and what the method does after it; the gradient's norm before clipping."""
    parameters = [p for group in training.optimizer.param_groups for p in group["params"]]
    limit = math.inf if training.spec.clip == "none" else training.spec.clip
    norm = whole(nn.utils.clip_grad_norm_(parameters, limit))
    training.optimizer.step()
    training.spec.method.after_step(training.model, training.step)
    if training.spec.method.restart(training.model, training.spec, training.step + 1):
        training.optimizer.state.clear()
    training.optimizer.zero_grad()
    return norm
