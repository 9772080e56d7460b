"""AdaLoRA: ΔW = s B diag(e) A, begun at a high rank; the least important directions are cut as training goes on.

Zhang et al. 2023, arXiv 2303.10512. By PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Lt

from lorabench.methods._peft import ADAPTER, Tuner, tuner_layers
from lorabench.models import weights
from lorabench.spec.method import LoadBase
from lorabench.updates.update import Update

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

    from lorabench.spec.run_spec import RunSpec


@dataclass(frozen=True, kw_only=True)
class AdaLora(Tuner):
    """Starts with start_rank (M + N + 1) parameters for each matrix. The scale s is alpha / start_rank."""

    rank: Annotated[int, Ge(1)] = 8
    """Mean rank of the matrices at the end."""
    start_rank: Annotated[int, Ge(1)] = 12
    alpha: Annotated[float, Gt(0)] = 16.0
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    begin: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Share of the steps before the first cut."""
    end: Annotated[float, Gt(0), Lt(1)] = 0.7
    """Share of the steps after which the ranks stay as they are."""
    every: Annotated[int, Ge(1)] = 1
    """Steps between two cuts."""
    orthogonality: Annotated[float, Ge(0)] = 0.5
    """Weight of the penalty that keeps the rows of A and the columns of B orthonormal."""
    beta1: Annotated[float, Gt(0), Lt(1)] = 0.85
    """Of the moving average of the importance."""
    beta2: Annotated[float, Gt(0), Lt(1)] = 0.85
    """Of the moving average of its uncertainty."""

    def problems(self, spec: RunSpec) -> Iterator[str]:
        yield from super().problems(spec)
        if self.start_rank < self.rank:
            yield f"method.start_rank = {self.start_rank}: must be at least method.rank = {self.rank}"
        if self.begin >= self.end:
            yield f"method.begin = {self.begin}: must be less than method.end = {self.end}"

    def ranks(self, model: nn.Module) -> dict[str, tuple[str, int]]:
        return dict.fromkeys(self.match(model), ("method.start_rank", self.start_rank))

    def peft_config(self, model: nn.Module, spec: RunSpec) -> PeftConfig:
        from peft import AdaLoraConfig

        steps = spec.total_steps
        return AdaLoraConfig(
            target_r=self.rank,
            init_r=self.start_rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT takes any number
            lora_dropout=self.dropout,
            total_step=steps,
            tinit=int(self.begin * steps),
            tfinal=steps - max(int(self.end * steps), int(self.begin * steps) + 1),
            deltaT=self.every,
            beta1=self.beta1,
            beta2=self.beta2,
            orth_reg_weight=self.orthogonality,
            target_modules=self.match(model),
        )

    def layer_update(self, name: str, module: Any) -> Update:
        """The directions that are left; the scale is divided by the rank at the start, as PEFT does it."""
        e = module.lora_E[ADAPTER].detach()
        left = e[:, 0] != 0
        left[0] = left[0] | ~left.any()  # of a matrix that has lost all, one direction that is zero
        scale = module.scaling[ADAPTER] / (module.ranknum[ADAPTER] + 1e-5)
        return Update(
            parameter=f"{name}.weight",
            B=module.lora_B[ADAPTER].detach()[:, left] * scale,
            A=(module.lora_A[ADAPTER].detach() * e)[left],
            base_norm=weights.weight_norm(module.get_base_layer()),
            scale_source="config",
        )

    def penalty(self, model: nn.Module) -> Tensor | None:
        """The mean over all A and B of ‖A Aᵀ - I‖_F and ‖Bᵀ B - I‖_F: equation 4 of the paper, unsquared as in PEFT."""
        import torch

        layers: list[Any] = [module for _, module in tuner_layers(model)]
        grams = [layer.lora_A[ADAPTER] @ layer.lora_A[ADAPTER].T for layer in layers]
        grams += [layer.lora_B[ADAPTER].T @ layer.lora_B[ADAPTER] for layer in layers]
        norms = [torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)) for gram in grams]
        return self.orthogonality * torch.stack(norms).mean()

    def after_step(self, model: Any, step: int) -> None:
        model.base_model.update_and_allocate(step)

    def save(self, model: Any, load_base: LoadBase, folder: Path, keep: str) -> None:
        config = model.peft_config[ADAPTER]
        before = config.rank_pattern
        super().save(model, load_base, folder, keep)
        config.rank_pattern = before  # PEFT renames its keys as it saves, and training goes on after a snapshot

    def trained_state(self, model: Any) -> dict[str, Tensor]:
        """The averages behind the importance, and the directions that are left, go with the parameters."""
        import torch

        allocator, config = model.base_model.rankallocator, model.peft_config[ADAPTER]
        state = super().trained_state(model)
        for kind in ("exp_avg_ipt", "exp_avg_unc"):
            state |= {f"{kind}:{name}": tensor for name, tensor in getattr(allocator, kind).items()}
        for name, kept in (config.rank_pattern or {}).items():
            state[f"rank_pattern:{name}"] = torch.tensor(kept).flatten()
        return state

    def restore(self, model: Any, state: dict[str, Tensor]) -> None:
        import torch

        super().restore(model, {name: tensor for name, tensor in state.items() if ":" not in name})
        parameters, allocator = dict(model.base_model.model.named_parameters()), model.base_model.rankallocator
        patterns = {}
        for key, tensor in state.items():
            kind, _, name = key.partition(":")
            if kind == "rank_pattern":
                patterns[name] = tensor.tolist()
            elif name:
                getattr(allocator, kind)[name] = tensor.to(parameters[name].device)
                allocator.ipt[name] = torch.zeros_like(parameters[name])
        model.peft_config[ADAPTER].rank_pattern = patterns or None


EXAMPLE = AdaLora(rank=2, start_rank=4)
