"""The picture behind intruders: |cos| of each top direction of W0 + ΔW with each of W0's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.analysis import Analysis

if TYPE_CHECKING:
    from torch import Tensor

    from lorabench.updates.base import Tuned

SHOWN = 16
"""Top directions of each side of the picture, which has the 10 among which intruders are counted."""


@dataclass(frozen=True, kw_only=True)
class Cosines(Analysis):
    """Rows {i, j, cosine, null, null_std}: |u_iᵀ y_j| of left singular vectors, up to 16 u of W0 and y of W0 + ΔW.

    As in figure 1 of Shuttleworth et al. 2024, arXiv 2410.21228: an intruder y_j is a column without a large cosine.
    `i` = 0 is the largest cosine with any of W0's other directions, so that a column is not blank for what lies
    beyond. Null: ΔW's singular values in random directions, mean and standard deviation over the draws of
    `Tuned.nulls`.
    """

    needs: ClassVar[Literal["base"]] = "base"
    version: ClassVar[int] = 3
    values: ClassVar[dict[str, tuple[str, ...]]] = {"cosine": ("null", "null_std")}
    columns: ClassVar[dict[str, str]] = {
        "i": "left singular vector of W0, from 1; 0: whichever of those beyond is nearest",
        "j": "left singular vector of W0 + ΔW, from 1",
        "cosine": "|cos| of the two, in [0, 1]",
    }

    def compute(self, *layers: Tuned) -> list[dict[str, Any]]:
        import numpy as np

        from lorabench.linalg.nulls import over_draws

        (tuned,) = layers
        if not tuned.layer.svd.numerical_rank:
            return []
        found, *draws = (grid(each).numpy() for each in (tuned, *tuned.nulls))
        grids = {"cosine": found} | dict(zip(("null", "null_std"), over_draws(draws), strict=True))
        i, j = np.indices(found.shape, dtype=np.int16)
        numbers = {name: np.ravel(each).astype(np.float32) for name, each in grids.items()}
        return [{"i": i.ravel(), "j": j.ravel() + np.int16(1)} | numbers]


def grid(tuned: Tuned) -> Tensor:
    """|cos| (1 + m, n): first of the nearest direction of W0 beyond the m top ones, then of each of these."""
    import torch

    left = tuned.base.left
    cosines = (left.mT @ tuned.svd.U[:, :SHOWN]).abs().clamp_max_(1)
    beyond = torch.cat([cosines[SHOWN:], torch.zeros(1, cosines.shape[1])]).amax(0)
    return torch.cat([beyond[None], cosines[:SHOWN]])


EXAMPLE = Cosines()
