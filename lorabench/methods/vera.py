"""VeRA: ΔW = diag(b) B diag(d) A with random B and A, frozen and shared by all layers; only b and d are trained.

Kopiczko, Blankevoort and Asano 2024, arXiv 2310.11454. By PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Lt

from lorabench.methods._peft import ADAPTER, Tuner
from lorabench.models import weights
from lorabench.updates.update import Update

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from lorabench.spec.run_spec import RunSpec


@dataclass(frozen=True, kw_only=True)
class Vera(Tuner):
    """r + M parameters for each matrix."""

    rank: Annotated[int, Ge(1)] = 256
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    start: Annotated[float, Gt(0)] = 0.1
    """What each element of d begins with; b begins with zero."""

    def peft_config(self, model: nn.Module, spec: RunSpec) -> PeftConfig:
        """The shared matrices are drawn from the run's seed: of one seed for all, all updates would look alike."""
        import torch
        from peft import VeraConfig

        return VeraConfig(
            r=self.rank,
            vera_dropout=self.dropout,
            d_initial=self.start,
            projection_prng_key=int(torch.randint(2**31, (), device="cpu")),
            save_projection=False,  # PEFT makes the random matrices again from the key: the paper's storage
            target_modules=self.match(model),
        )

    def layer_update(self, name: str, module: Any) -> Update:
        base = module.get_base_layer()
        b, d = module.vera_lambda_b[ADAPTER].detach(), module.vera_lambda_d[ADAPTER].detach()
        B = module.vera_B[ADAPTER][: base.out_features].to(b)
        A = module.vera_A[ADAPTER][:, : base.in_features].to(d)
        norm, parameter = weights.weight_norm(base), f"{name}.weight"
        if B.shape[1] >= min(B.shape[0], A.shape[1]):
            delta = (b[:, None] * B) @ (d[:, None] * A)
            return Update(parameter=parameter, B=delta.cpu(), base_norm=norm, precision="float32")
        return Update(parameter=parameter, B=b[:, None] * B, A=d[:, None] * A, base_norm=norm, scale_source="config")


EXAMPLE = Vera(rank=16)
