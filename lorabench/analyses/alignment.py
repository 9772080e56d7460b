"""Amplification: how ΔW relates to what W0 already does in ΔW's own directions (table 7 of the LoRA paper)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.analysis import Analysis

if TYPE_CHECKING:
    from torch import Tensor

    from lorabench.updates.base import Tuned

MAX_DIRECTIONS = 64
"""As many as the largest row of the paper's table."""


@dataclass(frozen=True, kw_only=True)
class Alignment(Analysis):
    """Rows {metric, r, value, null, null_std}: ‖Uᵀ W0 V‖_F with the top r directions of ΔW, of W0, and random ones.

    Hu et al. 2021, arXiv 2106.09685, section 7.3 and table 7. `r` counts 1, 2, 4, … up to all meaningful directions
    of ΔW (at most 64). `null` is what random directions give: for norms r ‖W0‖_F / √(M N), the root of the mean square
    over random orthonormal U and V, exactly; for the amplification, a ratio, its geometric mean (`typical_share`).
    `null_std`: the standard deviation of either (`projection_chance`); at r = 1 the amplification has none.
    `amplification` and `projected_norm` (without `_at`) stand for the largest r.
    """

    needs: ClassVar[Literal["base"]] = "base"
    version: ClassVar[int] = 3
    metrics: ClassVar[dict[str, str]] = {
        "amplification": "‖ΔW‖ over ‖Uᵀ W0 V‖ with U, V all meaningful directions of ΔW; null: random U, V",
        "projected_norm": "‖Uᵀ W0 V‖ with U, V all meaningful directions of ΔW; null: random U, V",
        "projected_norm_of_base": "‖Uᵀ W0 V‖ with as many top directions of W0 itself; null: random U, V",
        "amplification_at": "amplification with the top r directions of ΔW",
        "projected_norm_at": "projected_norm with the top r directions of ΔW",
        "projected_norm_of_base_at": "projected_norm_of_base with the top r directions of W0",
        "base_norm": "‖W0‖",
        "update_norm": "‖ΔW‖",
    }
    per_layer: ClassVar[dict[str, str]] = dict.fromkeys(
        ("amplification", "projected_norm", "projected_norm_of_base", "base_norm", "update_norm"), ""
    )

    def compute(self, *layers: Tuned) -> list[dict[str, Any]]:
        from lorabench.linalg.nulls import projection_chance

        (tuned,) = layers
        delta, base = tuned.layer.svd, tuned.base
        most = min(delta.numerical_rank, delta.U.shape[1], MAX_DIRECTIONS)
        if not most:
            return []
        norms = projected_norms(delta.U[:, :most], base.weight, delta.Vh[:most])
        top = base.svd.S.square().cumsum(0).sqrt()
        base_norm, update_norm = float(base.svd.S.norm()), float(delta.S.norm())
        M, N = base.weight.shape
        rows = [_row("base_norm", None, base_norm), _row("update_norm", None, update_norm)]
        for r in [*(2**power for power in range((most - 1).bit_length())), most]:
            values = {"projected_norm": float(norms[r - 1]), "projected_norm_of_base": float(top[r - 1])}
            random = r * base_norm / (M * N) ** 0.5
            std, inverse_std = projection_chance(base.svd.S.double().numpy(), r, M, N)
            found = [_row(name, r, value, random, std) for name, value in values.items()]
            if values["projected_norm"] and random:
                null, spread = update_norm / (random * typical_share(r)), inverse_std and update_norm * inverse_std
                found.append(_row("amplification", r, update_norm / values["projected_norm"], null, spread))
            rows += [row | {"metric": f"{row['metric']}_at"} for row in found] + (found if r == most else [])
        return rows


def projected_norms(U: Tensor, W: Tensor, Vh: Tensor) -> Tensor:
    """‖U[:, :r]ᵀ W Vh[:r]ᵀ‖_F for r = 1, 2, … (K,), of U (M, K), W (M, N) and Vh (K, N)."""
    core = (U.mT.to(W.dtype) @ (W @ Vh.mT.to(W.dtype))).double()
    return core.square().cumsum(0).cumsum(1).diagonal().sqrt()


def typical_share(r: int) -> float:
    """Geometric mean of ‖Uᵀ W V‖_F over its root mean square, of random U (M, r) and V (N, r).

    0.53 at r = 1, 0.99 at 8. The square is χ² with r² degrees of freedom, whose mean logarithm is ψ(r² / 2) + ln 2: for
    a W of many directions and r far below its size, where the r × r entries are independent and normal.
    """
    from scipy.special import digamma

    return math.exp((float(digamma(r**2 / 2)) + math.log(2 / r**2)) / 2)


def _row(
    metric: str, r: int | None, value: float, null: float | None = None, null_std: float | None = None
) -> dict[str, Any]:
    return {"metric": metric, "r": r, "value": value, "null": null, "null_std": null_std}


EXAMPLE = Alignment()
