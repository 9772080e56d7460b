"""How much of one run's ΔW lies in the subspace of another's: energy shares, φ in one number, and a permutation test.

Shapes: d the width of a side, p and q the meaningful directions of the two updates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.analyses.subspace import MAX_DIRECTIONS, directions
from lorabench.spec.analysis import Analysis

if TYPE_CHECKING:
    from torch import Tensor

    from lorabench.updates.layer import LayerSVD


@dataclass(frozen=True, kw_only=True)
class Overlap(Analysis):
    """Rows {side, metric, value, null, null_std}: the `input` and the `output` side, beside random subspaces.

    The subspace of an update is spanned by all its meaningful directions (see `subspace`), of which a dense ΔW keeps
    the top 64. The p-value has no null: under chance alone it is uniform. An energy share needs all of ΔW, and is
    missing where singular vectors alone were kept. None of this depends on the scale of an update.
    """

    needs: ClassVar[Literal["layer", "pair"]] = "pair"
    metrics: ClassVar[dict[str, str]] = {
        "phi_full": "φ(p, q) of all meaningful directions",
        "phi_first": "φ(1, 1): squared cosine between the two top directions",
        "energy_a_in_b": "share of ‖ΔW_a‖² in the subspace of b",
        "energy_b_in_a": "share of ‖ΔW_b‖² in the subspace of a",
        "p_value": "permutation test of the top 64 directions, rows of b permuted",
    }

    def compute(self, *layers: LayerSVD) -> list[dict[str, Any]]:
        a, b = layers
        return [row for place in directions(a, b, limit=None) for row in _side(a, b, *place)]


def _side(a: LayerSVD, b: LayerSVD, side: str, U: Tensor, V: Tensor) -> list[dict[str, Any]]:
    from lorabench.linalg.decompose import subspace_similarity
    from lorabench.linalg.nulls import permutation_p_value, similarity_chance

    (d, p), q = U.shape, V.shape[1]
    phi = subspace_similarity(U, V)
    mean, std = similarity_chance(p, q, d)
    rows = [
        {"metric": "phi_full", "value": float(phi[-1, -1]), "null": mean[-1, -1], "null_std": std[-1, -1]},
        {"metric": "phi_first", "value": float(phi[0, 0]), "null": mean[0, 0], "null_std": std[0, 0]},
        {"metric": "energy_a_in_b", "value": energy_share(a, side, V), "null": q / d, "null_std": None},
        {"metric": "energy_b_in_a", "value": energy_share(b, side, U), "null": p / d, "null_std": None},
    ]
    p_value = permutation_p_value(U[:, :MAX_DIRECTIONS], V[:, :MAX_DIRECTIONS])
    rows.append({"metric": "p_value", "value": p_value, "null": None, "null_std": None})
    return [{"side": side} | row for row in rows if row["value"] is not None]


def energy_share(layer: LayerSVD, side: str, Q: Tensor) -> float | None:
    """Share of ‖ΔW‖² in the span of `Q` (d, q) on a side; None where neither ΔW nor all its vectors were kept."""
    from lorabench.linalg.decompose import energy_in_subspace

    svd, update = layer.svd, layer.update
    if layer.is_complete:
        vectors = svd.Vh.mT if side == "input" else svd.U
        return energy_in_subspace(vectors * svd.S[: vectors.shape[1]].to(vectors.dtype), Q)
    if update is None or update.A is not None:
        return None
    return energy_in_subspace(update.B.mT if side == "input" else update.B, Q)


EXAMPLE = Overlap()
