"""The bridge to any other optimizer of torch.optim: its class and its own fields, checked by torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorabench.config import plugins
from lorabench.config.decode import show
from lorabench.spec.optimizer import Optimizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorabench.spec.run_spec import RunSpec

OWN = ("params", "lr", "weight_decay", "foreach", "fused", "capturable", "differentiable", "maximize")
"""What the run says, or what changes only how it is computed."""
UNFIT = {
    "AdamW": 'use optimizer = "adamw"',
    "LBFGS": "it computes the loss several times a step",
    "Muon": 'use optimizer = "muon"',
    "SGD": 'use optimizer = "sgd"',
    "SparseAdam": "it takes sparse gradients alone",
}
"""What is not had by this bridge, and why."""


@dataclass(frozen=True, kw_only=True)
class Torch(Optimizer):
    """`optimizer.type = "Adagrad"`, `optimizer.config.lr_decay = [0.0, 0.1]`. A list in a list is one value."""

    type: str = "Adamax"
    """A class of torch.optim: `Adagrad`, `Adadelta`, `Adafactor`, `NAdam`, `RAdam`, `RMSprop`, `Rprop` …"""
    config: dict[str, Any] = field(default_factory=dict)
    """Its own arguments; torch's defaults stand for the rest. `lr` and `weight_decay` are the run's."""

    @property
    def reads(self) -> tuple[str, ...]:
        known = _classes()
        return ("weight_decay",) if self.type in known and "weight_decay" in _arguments(known[self.type]) else ()

    def problems(self, spec: RunSpec) -> Iterator[str]:
        """What torch's class says, of a matrix to try it on."""
        yield from super().problems(spec)
        known = _classes()
        if self.type not in known:
            choices = sorted(known.keys() - UNFIT.keys())
            yield f"optimizer.type = {show(self.type)}: {plugins.unknown('class of torch.optim', self.type, choices)}"
            return
        if self.type in UNFIT:
            yield f"optimizer.type = {show(self.type)}: cannot be used here: {UNFIT[self.type]}"
            return
        names = [name for name in _arguments(known[self.type]) if name not in OWN]
        unknown = [key for key in self.config if key not in names]
        yield from (f"optimizer.config.{key}: {plugins.unknown('argument', key, names)}" for key in unknown)
        if not unknown:
            try:
                self._step_of_a_matrix(spec.weight_decay)
            except (ValueError, TypeError, RuntimeError) as error:
                yield f"optimizer.config = {show(self.config)}: torch.optim.{self.type} refuses it: {error}"

    def num_kept(self, model: nn.Module) -> float:
        """In the proportion of a matrix that it is tried on."""
        import torch

        matrix, optimizer = self._step_of_a_matrix(0.0)
        kept = sum(value.numel() for value in optimizer.state[matrix].values() if torch.is_tensor(value) and value.ndim)
        return super().num_kept(model) / 2 * kept / matrix.numel()

    def make(self, spec: RunSpec, model: nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return self._made(groups, spec.lr, spec.weight_decay)

    def _made(self, parameters: Any, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in self.config.items()}
        decay = {"weight_decay": weight_decay} if self.reads else {}
        made: torch.optim.Optimizer = _classes()[self.type](parameters, lr=lr, **decay, **options)
        return made

    def _step_of_a_matrix(self, weight_decay: float) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        import torch

        matrix = torch.nn.Parameter(torch.ones(32, 32))
        matrix.grad = torch.ones(32, 32)
        optimizer = self._made([matrix], 1e-3, weight_decay)
        optimizer.step()
        return matrix, optimizer


def _classes() -> dict[str, Any]:
    import torch

    base = torch.optim.Optimizer
    return {name: cls for name, cls in vars(torch.optim).items()
            if inspect.isclass(cls) and issubclass(cls, base) and cls is not base}  # fmt: skip


def _arguments(cls: Any) -> list[str]:
    return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]


EXAMPLE = Torch()
