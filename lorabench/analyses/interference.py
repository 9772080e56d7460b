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

    Unrelated: singular directions that are uniformly random and independent, singular values as they are. The overlaps
    are tr(G_a G_b) / (‖G_a‖_F ‖G_b‖_F) of the Gram matrices G = ΔWᵀΔW (input) or ΔWΔWᵀ (output): the RV coefficient
    (Escoufier 1973), subspaces compared direction by direction with their energy as weight, so that no rank need be
    chosen. Unlike after TIES' trimming, `sign_conflict_top` looks at the other update's sign however small its entry.
    The spread is exact but for `norm_ratio`, where it is to first order. A zero update has no rows, nor has one of
    which only some singular vectors were kept.
    """

    needs: ClassVar[Literal["layer", "pair"]] = "pair"
    version: ClassVar[int] = 2
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
        cosine_std = (M * N) ** -0.5
        conflicts = sign_conflicts(a, b, TOP)
        rows = [
            ("cosine", cosine, 0.0, cosine_std),
            *(_overlap(side, *layers) for side in ("input", "output")),
            ("sign_conflict", conflicts.all, 0.5, _share_std(conflicts.num_all)),
            ("sign_conflict_top", conflicts.top, 0.5, _share_std(conflicts.num_top)),
            ("norm_ratio", max(0.0, 1 + 2 * product / energy) ** 0.5, 1.0, norms[0] * norms[1] / energy * cosine_std),
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


def _share_std(count: int) -> float | None:
    """Of a share of so many entries whose signs are independent.

    They are, two by two: U diag(S) Vᵀ with random U and V keeps its law when any row or column changes its sign.
    """
    return 0.5 / count**0.5 if count else None


def _overlap(side: str, a: LayerSVD, b: LayerSVD) -> tuple[str, float, float, float]:
    """Chance: of tr(G_a G_b), whatever the spectra."""
    from lorabench.linalg.nulls import trace_chance
    from lorabench.updates.pair_interference import gram_overlap

    d = a.shape[1] if side == "input" else a.shape[0]
    units = [layer.svd.S.square() / layer.svd.S.square().norm() for layer in (a, b)]  # eigenvalues of G / ‖G‖
    of_a, of_b = ((float(unit.sum()), 1.0) for unit in units)
    mean, std = trace_chance(of_a, of_b, d)
    norms = [float(layer.svd.S.square().norm()) for layer in (a, b)]
    found = gram_overlap(*(_side(layer, side) for layer in (a, b)))
    return f"overlap_{side}", min(1.0, found / (norms[0] * norms[1])), float(mean), float(std)


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
