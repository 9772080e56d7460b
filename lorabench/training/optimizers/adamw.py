"""AdamW, with `beta1`, `beta2`, `epsilon` and `weight_decay` of the run.

Loshchilov and Hutter 2017, arXiv 1711.05101. By torch, fused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.spec.optimizer import Optimizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorabench.spec.run_spec import RunSpec


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Keeps two moments of each number."""

    steps_rows: ClassVar[bool] = True
    by_number: ClassVar[bool] = True

    def make(self, spec: RunSpec, model: nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return adamw(spec, groups)


def adamw(spec: RunSpec, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """With the run's hyperparameters."""
    import torch

    return torch.optim.AdamW(
        groups,
        lr=spec.lr,
        betas=(spec.beta1, spec.beta2),
        eps=spec.epsilon,
        weight_decay=spec.weight_decay,
        fused=True,
    )


EXAMPLE = AdamW()
