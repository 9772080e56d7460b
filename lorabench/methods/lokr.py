"""LoKr: ΔW = s W1 ⊗ (B A), a Kronecker product, of rank up to rank(W1) r.

KronA: Edalati et al. 2022, arXiv 2212.10650; LyCORIS: Yeh et al. 2023, arXiv 2309.14859. By PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Lt

from lorabench import weights
from lorabench.methods._peft import ADAPTER, Tuner
from lorabench.update import Update

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from lorabench.spec import RunSpec


@dataclass(frozen=True, kw_only=True)
class Lokr(Tuner):
    """W1 is (a, c), the second factor (M / a, N / c). The scale s is alpha / rank."""

    without: ClassVar[tuple[str, ...]] = ("nf4",)

    rank: Annotated[int, Ge(1)] = 8
    """Of the second factor; at half of its longer side or more it is a full matrix."""
    alpha: Annotated[float, Gt(0)] = 8.0
    factor: Annotated[int, Ge(-1)] = -1
    """Largest a and c (-1: the divisors nearest to √M and √N)."""
    decompose_both: bool = False
    """Whether W1 is a product of rank r as well."""
    rank_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Probability that a row of ΔW is left out in a training step."""

    def peft_config(self, model: nn.Module, spec: RunSpec) -> PeftConfig:
        from peft import LoKrConfig

        return LoKrConfig(
            r=self.rank,
            alpha=self.alpha,  # type: ignore[arg-type]  # PEFT takes any number
            decompose_factor=self.factor,
            decompose_both=self.decompose_both,
            rank_dropout=self.rank_dropout,
            target_modules=self.match(model),
        )

    def layer_update(self, name: str, module: Any) -> Update:
        """Factored where that is smaller: W1 ⊗ (B A) = (U1 ⊗ B)(V1 ⊗ A), with W1 = U1 V1 by its smaller side."""
        import torch

        parameter, norm = f"{name}.weight", weights.weight_norm(module.get_base_layer())
        scale, pair = module.scaling[ADAPTER], None
        W1 = module.lokr_w1[ADAPTER].detach() if ADAPTER in module.lokr_w1 else None
        if W1 is None:
            pair = module.lokr_w1_a[ADAPTER].detach(), module.lokr_w1_b[ADAPTER].detach()
        elif W1.shape[0] <= W1.shape[1]:
            pair = torch.eye(W1.shape[0], device=W1.device, dtype=W1.dtype), W1
        else:
            pair = W1, torch.eye(W1.shape[1], device=W1.device, dtype=W1.dtype)
        if ADAPTER in module.lokr_w2_a:
            B = torch.kron(pair[0], module.lokr_w2_a[ADAPTER].detach())
            A = torch.kron(pair[1], module.lokr_w2_b[ADAPTER].detach())
            if B.shape[1] < min(B.shape[0], A.shape[1]):
                return Update(parameter=parameter, B=scale * B, A=A, base_norm=norm, scale_source="config")
        delta = module.get_delta_weight(ADAPTER).detach()
        return Update(parameter=parameter, B=delta.cpu(), base_norm=norm, precision="float32")


EXAMPLE = Lokr(rank=2)
