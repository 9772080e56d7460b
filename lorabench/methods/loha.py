"""LoHa: ΔW = s (B1 A1) ⊙ (B2 A2), the elementwise product of two low-rank matrices, of rank up to r².

Hyeon-Woo et al. 2022 (FedPara), arXiv 2108.06098; LyCORIS: Yeh et al. 2023, arXiv 2309.14859. By PEFT.
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
class Loha(Tuner):
    """2 r (M + N) parameters for each matrix. The scale s is alpha / rank."""

    without: ClassVar[tuple[str, ...]] = ("nf4",)

    rank: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Gt(0)] = 8.0
    rank_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Probability that a row of ΔW is left out in a training step."""

    def ranks(self, model: nn.Module) -> dict[str, tuple[str, int]]:
        return dict.fromkeys(self.match(model), ("method.rank", self.rank))

    def peft_config(self, model: nn.Module, spec: RunSpec) -> PeftConfig:
        from peft import LoHaConfig

        return LoHaConfig(
            r=self.rank,
            alpha=self.alpha,  # type: ignore[arg-type]  # PEFT takes any number
            rank_dropout=self.rank_dropout,
            target_modules=self.match(model),
        )

    def layer_update(self, name: str, module: Any) -> Update:
        """Factored where r² is small."""
        from lorabench.linalg.products import hadamard

        parts = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        B, A = hadamard(*(getattr(module, part)[ADAPTER].detach() for part in parts))
        return product_update(name, module, B, A)


EXAMPLE = Loha(rank=2)
