"""LoRA-FA: A stays as it was drawn, and B steps by the gradient that is nearest to the full matrix's.

Zhang et al. 2023, arXiv 2308.03303 (version 2, of 2026, has the corrected gradient): with ΔW = s B A and A frozen, a
step g of B changes W by s g A, which is nearest to the full gradient G where g = s⁻² gᴮ (A Aᵀ)⁻¹, with gᴮ = s G Aᵀ, the
gradient of B. AdamW then takes its steps by g.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorabench.config.decode import InputError
from lorabench.spec.method import Factor
from lorabench.spec.optimizer import Optimizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorabench.spec.run_spec import RunSpec


@dataclass(frozen=True, kw_only=True)
class LoraFA(Optimizer):
    """Half of LoRA's parameters are trained, and layers need not keep their inputs for the backward pass."""

    def problems(self, spec: RunSpec) -> Iterator[str]:
        yield from super().problems(spec)
        yield from of_factors(self, spec)

    def prepare(self, model: nn.Module, spec: RunSpec) -> None:
        for factor in factors(self, model, spec):
            factor.A.requires_grad_(False)

    def make(self, spec: RunSpec, model: nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        from lorabench.training.optimizers.adamw import adamw

        optimizer, own = adamw(spec, groups), factors(self, model, spec)
        optimizer.register_step_pre_hook(lambda *_: _correct(own))
        return optimizer


def of_factors(optimizer: Optimizer, spec: RunSpec) -> Iterator[str]:
    """Why a method has not the A and B that such an optimizer needs."""
    if not spec.method.is_factors:
        yield (
            f'optimizer = "{optimizer.name}": steps by the A and B of linear layers, which method '
            f'{spec.method.name} has not alone; use method.name = "lora" without dora, embeddings and head'
        )


def factors(optimizer: Optimizer, model: nn.Module, spec: RunSpec) -> Sequence[Factor]:
    """Of each linear layer. InputError where they are on a parameter itself, of which several experts share one."""
    from lorabench.methods._peft import tuner_layers

    for name, module in tuner_layers(model):
        if hasattr(module, "parameter_name"):
            raise InputError(
                f'optimizer = "{optimizer.name}": steps by the A and B of linear layers, and {name} holds those of '
                "stacked experts or of a parameter itself; leave it out by method.targets"
            )
    return [*spec.method.factors(model).values()]


def _correct(own: Sequence[Factor]) -> None:
    import torch

    with torch.no_grad():
        for factor in own:
            if factor.B.grad is not None:
                A = factor.A.double()  # its Gram matrix has the square of its condition
                inverse = torch.linalg.pinv(A @ A.T, hermitian=True) / factor.scale**2
                factor.B.grad.copy_(factor.B.grad.double() @ inverse)


EXAMPLE = LoraFA()
