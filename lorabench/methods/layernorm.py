"""LayerNorm tuning: only the gains and biases of the normalization layers are trained.

Zhao et al. 2024, "Tuning LayerNorm in Attention", arXiv 2312.11420; before it, as a baseline, Qi et al. 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorabench.methods._chosen import Chosen, none_found

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Chosen):
    """Every LayerNorm and RMSNorm of the base, held in float32."""

    def choose(self, model: nn.Module) -> list[str]:
        norms = [name for name, module in model.named_modules() if type(module).__name__.endswith("Norm")]
        names = [f"{norm}.{name}" for norm in norms for name, _ in model.get_submodule(norm).named_parameters()]
        if not names:
            raise none_found(self, "normalization layers", model)
        return names


EXAMPLE = LayerNorm()
