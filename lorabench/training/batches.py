"""What the steps of a task are made of: this rank's share of each step's batch, in passes, and its loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from lorabench.spec.task import Example, Task
from lorabench.training.examples import LENGTHS, PIXELS, Batch, Order, collate, end_to_end
from lorabench.training.flops import Shape, num_positions
from lorabench.training.meter import Shapes
from lorabench.training.predictions import PLACES, by_tokens, places, task_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorabench.training.state import Training

CPU = torch.device("cpu")  # where batches are made and counted: to count on a GPU would wait for it


class Work(NamedTuple):
    """What there is to do in a step, over all ranks; `shapes` are this rank's passes."""

    tokens: int
    padded: int
    labels: int
    shapes: Shapes


class Batches(ABC):
    """The source of a task's steps, in the run's own order of the data; what it depends on is in the checkpoint."""

    def __init__(self, training: Training):
        self.training = training

    @abstractmethod
    def next(self) -> tuple[list[Batch], Work]:
        """The parts of the next step's batch, on the CPU, and what there is to do in them, over all ranks."""

    @abstractmethod
    def loss(self, model: nn.Module, part: Batch) -> torch.Tensor:
        """What a part, on the model's device, adds to the loss of the step that `next` has given."""

    def share(self, total: torch.Tensor) -> torch.Tensor:
        """The same of the sum over the part's own predictions, for objectives whose runs can share passes."""
        raise NotImplementedError

    def about(self) -> dict[str, float]:
        """What `steps.jsonl` has of the step beside its loss, called by all ranks; nothing that a clock has made."""
        return {}

    def parts(self, rows: Sequence[Example]) -> tuple[list[Batch], Work]:
        """Rows collated, as many in a pass as the spec has it."""
        training = self.training
        chunks = [rows[i : i + training.micro] for i in range(0, len(rows), training.micro)]
        parts = [self.collated(chunk) for chunk in chunks]
        task = training.examples.task
        if training.spec.padding == "free":
            parts = [end_to_end(part) for part in parts]
        if by_tokens(task):
            parts = [part | {PLACES: places(task.targets(part))} for part in parts]
        shapes = tuple(shape for part in parts for shape in batch_shapes(part, task))
        own = map(task.count, parts), (example_length(row, task) for row in rows), map(num_positions, shapes)
        labels, tokens, padded = map(int, training.world.sum([sum(each) for each in own]))
        return parts, Work(tokens=tokens, padded=padded, labels=labels, shapes=shapes)

    def collated(self, rows: Sequence[Example]) -> Batch:
        return collate(list(rows), self.training.examples.padding, CPU)


class Rows(Batches):
    """The training split itself."""

    def __init__(self, training: Training):
        super().__init__(training)
        spec, self.splits = training.spec, training.examples.splits
        self._order = Order(len(self.splits["train"]), spec.batch_size, spec.seed, training.stage)
        self._labels = 1

    def next(self) -> tuple[list[Batch], Work]:
        training = self.training
        first, indices = training.task_step * training.spec.batch_size, self._order.indices(training.task_step)
        own = training.world.share([*enumerate(indices, first)])
        seed, task = (training.spec.seed, training.stage), training.examples.task
        rows = [row for place, index in own for row in task.step_rows(self.splits, index, (*seed, place))]
        parts, work = self.parts(rows)
        self._labels = max(work.labels, 1)
        return parts, work

    def loss(self, model: nn.Module, part: Batch) -> torch.Tensor:
        return self.share(task_loss(model, self.training.examples.task, part))

    def share(self, total: torch.Tensor) -> torch.Tensor:
        return total / self._labels


def example_length(example: Example, task: Task) -> int:
    """Tokens that go through the model: what is read, and what a decoder of its own is to write; 1 of an image."""
    return 1 if task.unit == "images" else sum(task.lengths(example))


def batch_shapes(batch: Batch, task: Task) -> list[Shape]:
    """Padding included; of examples laid end to end, which are each by itself, that of each; of images
    (n, channels, height, width)."""
    if LENGTHS in batch:
        return [(1, length) for length in batch[LENGTHS].tolist()]
    if PIXELS in batch:
        return [tuple(batch[PIXELS].shape)]
    return [(len(batch["input_ids"]), *(batch[key].shape[1] for key in task.sequences))]
