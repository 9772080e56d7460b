"""Muon: each matrix steps along its momentum made orthogonal; vectors, embeddings and heads are left to AdamW.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; the scale of its steps: Liu et al. 2025, arXiv
2502.16982. By torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le, Lt

from lorabench.config.decode import InputError
from lorabench.spec.optimizer import Optimizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorabench.spec.run_spec import RunSpec


@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """LoRA's A and B are such matrices, each by itself. Keeps one number for each of a matrix, two of all else."""

    momentum: Annotated[float, Ge(0), Lt(1)] = 0.95
    nesterov: bool = True
    newton_schulz: Annotated[int, Ge(1), Le(99)] = 5
    """Newton-Schulz iterations that make a matrix nearly orthogonal, in bfloat16."""
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Of a step of an (M, N) matrix, over `lr`: 0.2 √max(M, N), with which a learning rate is AdamW's too, or
    √max(1, M / N)."""

    def prepare(self, model: nn.Module, spec: RunSpec) -> None:
        if not matrices(model):
            raise InputError(
                f'optimizer = "{self.name}": method {spec.method.name} trains no matrix but of embeddings and heads, '
                'which are AdamW\'s; use optimizer = "adamw"'
            )

    def num_kept(self, model: nn.Module) -> float:
        return super().num_kept(model) - sum(parameter.numel() for parameter in matrices(model))

    def make(self, spec: RunSpec, model: nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        import torch

        from lorabench.training.optimizers._several import several
        from lorabench.training.optimizers.adamw import adamw

        own = {id(parameter) for parameter in matrices(model)}
        muon = torch.optim.Muon(
            [*_part(groups, lambda parameter: id(parameter) in own)],
            lr=spec.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.newton_schulz,
            adjust_lr_fn=self.scale,
            weight_decay=spec.weight_decay,
        )
        others = [*_part(groups, lambda parameter: id(parameter) not in own)]
        return several([muon, adamw(spec, others)]) if others else muon


def matrices(model: Any) -> list[nn.Parameter]:
    """What is trained of a model and has two dimensions, but for embeddings, output matrices and new heads."""
    from torch import nn

    from lorabench.models import base_model as models
    from lorabench.models.weights import output_embeddings

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    apart = [base.get_submodule(name) for name in models.new_heads(base)]
    apart += [module for module in model.modules() if isinstance(module, nn.Embedding)]
    outside = {id(parameter) for module in apart for parameter in module.parameters()}
    output = output_embeddings(base)
    outside.add(id(getattr(output, "weight", None)))
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return [parameter for parameter in trained if parameter.ndim == 2 and id(parameter) not in outside]


def _part(groups: list[dict[str, Any]], fits: Any) -> Iterator[dict[str, Any]]:
    """The groups with those of their parameters that fit; without those that have none."""
    for group in groups:
        if parameters := [parameter for parameter in group["params"] if fits(parameter)]:
            yield group | {"params": parameters}


EXAMPLE = Muon()
