"""Subspace similarity φ(i, j) between the top singular directions of two runs' ΔW, beside chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.analysis import Analysis

if TYPE_CHECKING:
    from torch import Tensor

    from lorabench.updates.layer import LayerSVD

MAX_DIRECTIONS = 64
"""The grid of (i, j) ends here: 64 x 64 is the largest in the LoRA paper (figures 3 and 4)."""


@dataclass(frozen=True, kw_only=True)
class Subspace(Analysis):
    """Rows {side, i, j, phi, chance, chance_std}; i counts directions of run a, j of run b, from 1.

    φ(i, j) = ‖U_a(:, :i)ᵀ U_b(:, :j)‖_F² / min(i, j) in [0, 1] (Hu et al. 2021, arXiv 2106.09685, equation 4), of
    right-singular vectors (`input`) and left ones (`output`). Directions beyond an update's numerical rank are
    arbitrary and left out: a zero update has no rows. Chance: independent random subspaces of the same space.
    """

    needs: ClassVar[Literal["layer", "pair"]] = "pair"
    max_pairs: ClassVar[int] = 256  # a pair has up to 2 x 64 x 64 rows a layer
    values: ClassVar[dict[str, tuple[str, ...]]] = {"phi": ("chance", "chance_std")}
    columns: ClassVar[dict[str, str]] = {
        "i": "top directions of run a",
        "j": "top directions of run b",
        "phi": "subspace similarity φ(i, j), in [0, 1]",
        "chance": "mean of φ(i, j) over random subspaces",
        "chance_std": "its standard deviation",
    }

    def compute(self, *layers: LayerSVD) -> list[dict[str, Any]]:
        import numpy as np

        from lorabench.linalg.decompose import subspace_similarity
        from lorabench.linalg.nulls import similarity_chance

        rows = []
        for side, a, b in directions(*layers):
            (d, p), q = a.shape, b.shape[1]
            mean, std = similarity_chance(p, q, d)
            i, j = np.indices((p, q), dtype=np.int16) + np.int16(1)
            grids = {"phi": subspace_similarity(a, b).numpy(), "chance": mean, "chance_std": std}
            columns = {"i": i, "j": j} | {key: grid.astype(np.float32) for key, grid in grids.items()}
            rows.append({"side": side} | {key: np.ravel(grid) for key, grid in columns.items()})
        return rows


def directions(a: LayerSVD, b: LayerSVD, *, limit: int | None = MAX_DIRECTIONS) -> list[tuple[str, Tensor, Tensor]]:
    """For the input and the output side the meaningful singular directions (d, p) and (d, q), at most `limit` each.

    None: all that were kept. Empty where one ΔW is 0. Raises ValueError where the layers have different shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"{a.parameter}: shapes {a.shape} and {b.shape} of two runs differ")
    p, q = (min(layer.svd.numerical_rank, layer.svd.U.shape[1], limit or layer.svd.U.shape[1]) for layer in (a, b))
    if not (p and q):
        return []
    return [("input", a.svd.Vh[:p].mT, b.svd.Vh[:q].mT), ("output", a.svd.U[:, :p], b.svd.U[:, :q])]


EXAMPLE = Subspace()
