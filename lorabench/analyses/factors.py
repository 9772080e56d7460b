"""A and B apart, between two runs: how alike what they read is, and what they write, beside chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.analysis import Analysis

if TYPE_CHECKING:
    from torch import Tensor

    from lorabench.updates.layer import LayerSVD


@dataclass(frozen=True, kw_only=True)
class Factors(Analysis):
    """Rows {metric, value, null, null_std} of ΔW = s B A, B (M, r) and A (r, N), as they are kept; none of a dense ΔW.

    A starts at random, B at zero, and where A hardly moves two runs of one seed read alike, whatever their tasks (Zhu
    et al. 2024, arXiv 2402.16842, figure 1: Bs are alike for one task, As for one start). `similarity` is theirs, the
    goodness of fit of a canonical correlation analysis: ‖Q_aᵀQ_b‖² / r of orthonormal bases of the factors' spaces.
    It does not change with the basis (A to K A, B to B K⁻¹), as `cosine`, entry by entry, does: this is near 1 only
    where both are still near one start. Of PiSSA and OLoRA the factors hold the start beside what was learned.
    """

    needs: ClassVar[Literal["layer", "pair"]] = "pair"
    metrics: ClassVar[dict[str, str]] = {
        "similarity_A": "φ(r, r) of the row spaces of A, in [0, 1]: mean squared canonical correlation",
        "similarity_B": "φ(r, r) of the column spaces of B, in [0, 1]",
        "cosine_A": "⟨A_a, A_b⟩ over the product of the Frobenius norms, in [−1, 1]; of equal ranks alone",
        "cosine_B": "⟨B_a, B_b⟩ over the product of the Frobenius norms, in [−1, 1]; of equal ranks alone",
    }

    def compute(self, *layers: LayerSVD) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for name, side in (("A", "input"), ("B", "output")):
            a, b = (_columns(layer, side) for layer in layers)
            if a is None or b is None or not (a.any() and b.any()):
                return []
            rows += [{"metric": f"{metric}_{name}", **numbers} for metric, numbers in _compared(a, b)]
        return sorted(rows, key=lambda row: list(self.metrics).index(row["metric"]))


def _compared(a: Tensor, b: Tensor) -> list[tuple[str, dict[str, Any]]]:
    """Of factors (d, p) and (d, q) of one side."""
    from lorabench.linalg.decompose import subspace_similarity, thin_svd
    from lorabench.linalg.nulls import similarity_chance

    svds = [thin_svd(factor.double()) for factor in (a, b)]
    p, q = (svd.numerical_rank for svd in svds)
    phi = subspace_similarity(svds[0].U[:, :p], svds[1].U[:, :q])
    mean, std = similarity_chance(p, q, len(a))
    found = [("similarity", {"value": float(phi[-1, -1]), "null": mean[-1, -1], "null_std": std[-1, -1]})]
    if a.shape == b.shape:
        found.append(("cosine", {"value": _cosine(a, b), "null": 0.0, "null_std": a.numel() ** -0.5}))
    return found


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return max(-1.0, min(1.0, float((a * b).sum() / (a.norm() * b.norm()))))


def _columns(layer: LayerSVD, side: str) -> Tensor | None:
    """Aᵀ (N, r) of the input side, B (M, r) of the output side; None where ΔW is dense or its factors were not kept."""
    update = layer.update
    if update is None or update.A is None:
        return None
    return update.A.mT if side == "input" else update.B


def factor_cosine(layers: Sequence[LayerSVD], side: str) -> float | None:
    """Mean cosine of every two adapters' factors of this side, A or B; None where they differ in rank, or there are
    none. By chance 0 ± 1 / √(r d) for two."""
    import torch

    factors = [_columns(layer, side) for layer in layers]
    if None in [factor if factor is None else 0 for factor in factors]:
        return None
    some = [factor for factor in factors if factor is not None]
    if len({factor.shape for factor in some}) > 1 or not all(factor.any() for factor in some):
        return None
    rows = torch.stack([factor.double().flatten() / factor.double().norm() for factor in some])
    count = len(rows)
    return float((rows @ rows.mT).sum() - count) / (count * (count - 1))


EXAMPLE = Factors()
