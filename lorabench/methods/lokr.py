"""LoKr: ΔW = s W1 ⊗ (B A), a Kronecker product, of rank up to rank(W1) r.

KronA: Edalati et al. 2022, arXiv 2212.10650; LyCORIS: Yeh et al. 2023, arXiv 2309.14859. By PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Lt

from lorabench.methods._peft import ADAPTER, Tuner, product_update
from lorabench.updates.update import Update

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from lorabench.spec.run_spec import RunSpec


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
        """Factored where that is smaller."""
        from lorabench.linalg.products import kronecker

        B, A = kronecker(_factor(module, "lokr_w1"), _factor(module, "lokr_w2"))
        return product_update(name, module, B, A)


def _factor(module: Any, part: str) -> Any:
    """A matrix, or the two factors that are trained in its place."""
    if ADAPTER in getattr(module, part):
        return getattr(module, part)[ADAPTER].detach()
    return tuple(getattr(module, f"{part}_{side}")[ADAPTER].detach() for side in "ab")


EXAMPLE = Lokr(rank=2)
