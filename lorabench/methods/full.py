"""Full fine-tuning: every weight is trained; the baseline that the others are held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lorabench.methods._chosen import Chosen

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Full(Chosen):
    """All parameters train. ΔW is the difference of float32 masters, so that no rounding passes for rank."""

    trains_base: ClassVar[bool] = True

    def choose(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters()]


EXAMPLE = Full()
