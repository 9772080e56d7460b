"""BitFit: only the biases are trained, all weights are frozen.

Ben Zaken, Ravfogel and Goldberg 2022, arXiv 2106.10199. ΔW is a vector for each bias. Llama-like models have no biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorabench.methods._chosen import Chosen, none_found

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class BitFit(Chosen):
    """Every bias of the base, those of its layer norms included, held in float32."""

    def choose(self, model: nn.Module) -> list[str]:
        names = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"]
        if not names:
            raise none_found(self, "biases", model)
        return names


EXAMPLE = BitFit()
