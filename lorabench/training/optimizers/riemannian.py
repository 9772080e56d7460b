"""AdamW on LoRA's gradients preconditioned: that of A by (Bᵀ B + δ I)⁻¹, that of B by (A Aᵀ + δ I)⁻¹.

Zhang and Pilanci 2024, arXiv 2402.02347. As PEFT's `create_riemannian_optimizer` has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt

from lorabench.spec.method import Factor
from lorabench.spec.optimizer import Optimizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorabench.spec.run_spec import RunSpec


@dataclass(frozen=True, kw_only=True)
class Riemannian(Optimizer):
    """Steps of B A that do not depend on how it is split into B and A."""

    damping: Annotated[float, Gt(0)] = 1e-2
    """δ: of B = 0, where training begins, there is no inverse without it."""

    def problems(self, spec: RunSpec) -> Iterator[str]:
        from lorabench.training.optimizers.lora_fa import of_factors

        yield from super().problems(spec)
        yield from of_factors(self, spec)

    def prepare(self, model: nn.Module, spec: RunSpec) -> None:
        self._factors(model, spec)

    def make(self, spec: RunSpec, model: nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        from lorabench.training.optimizers.adamw import adamw

        optimizer, own = adamw(spec, groups), self._factors(model, spec)
        optimizer.register_step_pre_hook(lambda *_: self._precondition(own))
        return optimizer

    def _factors(self, model: nn.Module, spec: RunSpec) -> Sequence[Factor]:
        from lorabench.training.optimizers.lora_fa import factors

        return factors(self, model, spec)

    def _precondition(self, own: Sequence[Factor]) -> None:
        import torch

        with torch.no_grad():
            for factor in own:
                A, B = factor.A.double(), factor.B.double()
                damping = self.damping * torch.eye(len(A), dtype=A.dtype, device=A.device)
                if factor.A.grad is not None:
                    factor.A.grad.copy_(torch.linalg.solve(B.T @ B + damping, factor.A.grad.double()))
                if factor.B.grad is not None:
                    factor.B.grad.copy_(torch.linalg.solve(A @ A.T + damping, factor.B.grad.double().T).T)


EXAMPLE = Riemannian()
