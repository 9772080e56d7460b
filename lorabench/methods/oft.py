"""OFT: the weights are turned by a learned block-diagonal rotation: W = W0 R, with R from Cayley's transform.

Qiu et al. 2023, arXiv 2306.07280; this form, on the input side: Qiu et al. 2025 (OFTv2), arXiv 2506.19847. By PEFT.
ΔW = W0 (R - I) is of full rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Lt

from lorabench.config.decode import InputError
from lorabench.methods._peft import Tuner
from lorabench.models import weights

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from lorabench.spec.run_spec import RunSpec


@dataclass(frozen=True, kw_only=True)
class Oft(Tuner):
    """b (b - 1) / 2 parameters for each of the N / b blocks of b inputs."""

    block_size: Annotated[int, Ge(2)] = 32
    """Must divide the input width of every target."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Probability that a block is left unturned in a training step."""
    cayley_neumann: bool = False
    """Approximate Cayley's inverse by a Neumann series of five terms: faster, nearly orthogonal."""

    def peft_config(self, model: nn.Module, spec: RunSpec) -> PeftConfig:
        from peft import OFTConfig

        names = self.match(model)
        for name in names:
            width = weights.in_features(model.get_submodule(name))
            if width % self.block_size:  # PEFT would take another size in silence
                raise InputError(f"method.block_size = {self.block_size}: does not divide {width} ({name})")
        return OFTConfig(
            r=0,
            oft_block_size=self.block_size,
            module_dropout=self.dropout,
            use_cayley_neumann=self.cayley_neumann,
            target_modules=names,
        )


EXAMPLE = Oft(block_size=8)
