"""How far the top singular directions of W0 survive in W0 + ΔW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.analysis import Analysis

if TYPE_CHECKING:
    from lorabench.updates.base import Tuned


@dataclass(frozen=True, kw_only=True)
class Survival(Analysis):
    """Rows {metric, side, k, value, null, null_std} for k = 1, … up to 32 top directions of a side.

    `survival_at` is φ(k, k) between the top k directions of W0 and of W0 + ΔW (Hu et al. 2021, equation 4): 1 where
    they span the same space, and by chance (`null`) k / d. `direction_cosine` is |cos| of the k-th direction with its
    own successor, the k-th of W0 + ΔW; a small one may be two that have changed places, which `survival_at` forgives.
    `survival` stands for the largest k, `singular_value_shift` for σ_k(W0 + ΔW) / σ_k(W0) - 1.
    """

    needs: ClassVar[Literal["base"]] = "base"
    version: ClassVar[int] = 3
    metrics: ClassVar[dict[str, str]] = {
        "survival": "share of the top 32 directions of W0 that lies in the top 32 of W0 + ΔW; null: random ones",
        "survival_at": "the same for the top k directions",
        "direction_cosine": "|cos| between the k-th direction of W0 and the k-th of W0 + ΔW; null: random ones",
        "singular_value_shift": "k-th singular value of W0 + ΔW over that of W0, less 1",
    }
    per_layer: ClassVar[dict[str, str]] = {"survival": ""}

    def compute(self, *layers: Tuned) -> list[dict[str, Any]]:
        import numpy as np

        from lorabench.linalg.decompose import subspace_similarity
        from lorabench.linalg.nulls import cosine_chance, similarity_chance

        (tuned,) = layers
        before, after = tuned.base.svd, tuned.svd
        K = min(after.U.shape[1], before.U.shape[1])
        k = np.arange(1, K + 1, dtype=np.int32)
        sides = {"input": (before.Vh[:K].mT, after.Vh[:K].mT), "output": (before.U[:, :K], after.U[:, :K])}
        rows = []
        for side, (a, b) in sides.items():
            d = a.shape[0]
            kept = subspace_similarity(a, b).diagonal().numpy()
            own = (a * b).sum(0).abs().double().numpy().clip(max=1)
            null, std = (grid.diagonal() for grid in similarity_chance(K, K, d))
            cosine = [np.full(K, number) for number in cosine_chance(d)]
            columns = {
                "survival_at": (k, kept, null, std),
                "direction_cosine": (k, own, *cosine),
                "survival": (k[-1:], kept[-1:], null[-1:], std[-1:]),
            }
            rows += [_row(metric, side, *values) for metric, values in columns.items()]
        with np.errstate(divide="ignore", invalid="ignore"):
            shift = after.S[:K].numpy() / before.S[:K].numpy() - 1
        nothing = np.full(K, np.nan)
        return [*rows, _row("singular_value_shift", "both", k, shift, nothing, nothing)]


def _row(metric: str, side: str, *columns: Any) -> dict[str, Any]:
    return {"metric": metric, "side": side} | dict(zip(("k", "value", "null", "null_std"), columns, strict=True))


EXAMPLE = Survival()
