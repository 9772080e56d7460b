"""What two adapters do to each other in one layer: cosine, shared directions, sign conflicts, beside chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.analysis import Analysis

if TYPE_CHECKING:
    from torch import Tensor

    from lorabench.updates.layer import LayerSVD
    from lorabench.updates.update import Update

TOP = 0.2
"""Share of entries that count as the largest: what TIES keeps (Yadav et al. 2023, arXiv 2306.01708, figure 4)."""


@dataclass(frozen=True, kw_only=True)
class Interference(Analysis):
    """Rows {metric, value, null, null_std}; `null` is the mean of two unrelated updates, `null_std` their spread.

    Unrelated: singular directions that are uniformly random and independent, singular values as they are. The
    overlaps are tr(G_a G_b) / (‖G_a‖_F ‖G_b‖_F) of the Gram matrices G = ΔWᵀΔW (input) or ΔWΔWᵀ (output): the RV
    coefficient (Escoufier 1973), subspaces compared direction by direction with their energy as weight, so that no
    rank need be chosen. Unlike after TIES' trimming, `sign_conflict_top` looks at the other update's sign however
    small its entry. A zero update has no rows, nor has one of which only some singular vectors were kept.
    """

    needs: ClassVar[Literal["layer", "pair"]] = "pair"
    metrics: ClassVar[dict[str, str]] = {
        "cosine": "⟨ΔW_a, ΔW_b⟩ over the product of the Frobenius norms, in [−1, 1]",
        "overlap_input": "cosine of ΔW_aᵀΔW_a and ΔW_bᵀΔW_b, in [0, 1]: 1 where they read the same input directions",
        "overlap_output": "cosine of ΔW_aΔW_aᵀ and ΔW_bΔW_bᵀ, in [0, 1]: 1 where they write the same output directions",
        "sign_conflict": "share of the entries, none of them 0, whose signs differ",
        "sign_conflict_top": "the same among the entries that are in the largest 20% of either update",
        "norm_ratio": "‖ΔW_a + ΔW_b‖ over √(‖ΔW_a‖² + ‖ΔW_b‖²), in [0, √2]: below 1 they cancel, 1 orthogonal",
    }

    def compute(self, *layers: LayerSVD) -> list[dict[str, Any]]:
        from lorabench.updates.pair_interference import inner, sign_conflicts

        a, b = map(_update, layers)
        norms = [float(layer.svd.S.norm()) for layer in layers]
        if a is None or b is None or not all(norms):
            return []
        M, N = a.shape
        product, energy = inner(a, b), norms[0] ** 2 + norms[1] ** 2
        cosine = min(1.0, max(-1.0, product / (norms[0] * norms[1])))
        conflicts = sign_conflicts(a, b, TOP)
        rows = [
            ("cosine", cosine, 0.0, (M * N) ** -0.5),
            *(_overlap(side, *layers) for side in ("input", "output")),
            ("sign_conflict", conflicts.all, 0.5, None),
            ("sign_conflict_top", conflicts.top, 0.5, None),
            ("norm_ratio", max(0.0, 1 + 2 * product / energy) ** 0.5, 1.0, None),
        ]
        names = ("metric", "value", "null", "null_std")
        return [dict(zip(names, row, strict=True)) for row in rows if row[1] is not None]


def _update(layer: LayerSVD) -> Update | None:
    """ΔW: as it was kept, or out of an SVD with all its vectors."""
    from lorabench.updates.update import Update

    if layer.update is not None:
        return layer.update
    svd = layer.svd
    whole = svd.U.shape[1] == len(svd.S)
    return Update(parameter=layer.parameter, B=svd.U * svd.S.to(svd.U), A=svd.Vh) if whole else None


def _overlap(side: str, a: LayerSVD, b: LayerSVD) -> tuple[str, float, float, None]:
    """Chance: E tr(G_a G_b) = tr G_a tr G_b / d, whatever the spectra."""
    from lorabench.updates.pair_interference import gram_overlap

    d = a.shape[1] if side == "input" else a.shape[0]
    traces = [float(layer.svd.S.square().sum()) for layer in (a, b)]
    norms = [float(layer.svd.S.square().norm()) for layer in (a, b)]
    found = gram_overlap(*(_side(layer, side) for layer in (a, b)))
    scale = norms[0] * norms[1]
    return f"overlap_{side}", min(1.0, found / scale), traces[0] * traces[1] / d / scale, None


def _side(layer: LayerSVD, side: str) -> Tensor:
    """X (k, d) with XᵀX = G: S Vh or (U S)ᵀ where all vectors are there, else ΔW itself."""
    svd = layer.svd
    if svd.U.shape[1] < len(svd.S):
        assert layer.update is not None
        W = layer.update.dense()
        return W if side == "input" else W.mT
    S = svd.S.to(svd.U)
    return S[:, None] * svd.Vh if side == "input" else (svd.U * S).mT


EXAMPLE = Interference()
