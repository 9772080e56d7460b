"""Head only: the task head on frozen features (a linear probe), or a language model's output matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorabench.methods._chosen import Chosen, none_found
from lorabench.models.base_model import new_heads
from lorabench.models.targets import head_modules
from lorabench.models.weights import untie

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Head(Chosen):
    """An output matrix that is tied to the input embedding is untied first, so that the features stay as they are."""

    def choose(self, model: nn.Module) -> list[str]:
        if new_heads(model):
            return []
        untie(model)
        names = [f"{head}.{name}" for head in head_modules(model) for name, _ in
                 model.get_submodule(head).named_parameters()]  # fmt: skip
        if not names:
            raise none_found(self, "head", model)
        return names


EXAMPLE = Head()
