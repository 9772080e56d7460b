"""Stochastic gradient descent, with momentum where it is asked for. By torch.

`weight_decay` is added to the gradient, and so under the momentum: it is no decoupled one as AdamW's is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Lt

from lorabench.spec.optimizer import Optimizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorabench.spec.run_spec import RunSpec


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Keeps nothing, or with momentum one number for each."""

    by_number: ClassVar[bool] = True

    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0
    nesterov: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        return ("weight_decay",)

    def problems(self, spec: RunSpec) -> Iterator[str]:
        yield from super().problems(spec)
        if self.nesterov and not self.momentum:
            yield f"optimizer.nesterov = true: needs optimizer.momentum above 0, not {self.momentum}"

    def num_kept(self, model: nn.Module) -> float:
        return super().num_kept(model) / 2 if self.momentum else 0.0

    def make(self, spec: RunSpec, model: nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.SGD(
            groups, lr=spec.lr, momentum=self.momentum, nesterov=self.nesterov, weight_decay=spec.weight_decay
        )


EXAMPLE = SGD(momentum=0.9)
