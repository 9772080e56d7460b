"""How gradients become steps: what a run's optimizer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.config.plugins import Plugin

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorabench.spec.run_spec import RunSpec

RATES = ("weight_decay", "beta1", "beta2", "epsilon")
"""The keys of a run that are an optimizer's, beside `lr`, `schedule` and `clip`, which all of them have."""


class Optimizer(Plugin, ABC):
    """Fields are hyperparameters. Add an optimizer by adding one file to `lorabench/training/optimizers/`.

    Learning rate, schedule and clipping are the run's; each group of parameters keeps its own peak of the rate.
    """

    folder: ClassVar[str] = "optimizers"
    in_sweep: ClassVar[tuple[str, str]] = ("[base]", "optimizer")
    by_name: ClassVar[bool] = True
    steps_rows: ClassVar[bool] = False
    """Whether `lorabench.training.packed` takes its steps for several runs at once."""
    by_number: ClassVar[bool] = False
    """Whether each number is stepped by itself, so that weights can be shared out over processes."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Which of `RATES` it has."""
        return RATES

    def problems(self, spec: RunSpec) -> Iterator[str]:
        """Why this optimizer cannot train as `spec` asks: `key = value: reason`."""
        for field in fields(spec):
            value = getattr(spec, field.name)
            if field.name in RATES and field.name not in self.reads and value != field.default:
                yield f'{field.name} = {value}: optimizer "{self.name}" has none; leave it out'

    def prepare(self, model: nn.Module, spec: RunSpec) -> None:
        """Freeze what it does not train, on a model with its method attached, before anything is counted.

        InputError where there is nothing that it can train.
        """

    def num_kept(self, model: nn.Module) -> float:
        """Numbers of 4 bytes that it keeps of a prepared model's trained parameters, from its first step on."""
        return 2.0 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    @abstractmethod
    def make(self, spec: RunSpec, model: nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Of a prepared model and the method's groups `{"params", "lr", "peak_lr"}`, which it may split."""
