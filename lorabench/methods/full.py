"""Full fine-tuning: every weight is trained; the baseline that the others are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lorabench.method import Method
from lorabench.model import weight_changes
from lorabench.update import Update

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """All parameters train. ΔW is the difference of float32 masters, so that no rounding passes for rank."""

    trains_base: ClassVar[bool] = True

    def attach(self, model: nn.Module) -> nn.Module:
        return model.requires_grad_(True)

    def updates(self, model: nn.Module, load_base: Callable[[], nn.Module]) -> Iterator[Update]:
        return weight_changes(model, load_base())


EXAMPLE = Full()
