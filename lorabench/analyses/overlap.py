"""How much of one run's ΔW lies in the subspace of another's: energy shares, φ in one number, and a permutation test.

Shapes: d the width of a side, p and q the meaningful directions of the two updates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.analyses.subspace import MAX_DIRECTIONS, directions
from lorabench.spec.analysis import Analysis

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from lorabench.updates.layer import LayerSVD


@dataclass(frozen=True, kw_only=True)
class Overlap(Analysis):
    """Rows {side, metric, value, null, null_std}: the `input` and the `output` side, beside random subspaces.

    The subspace of an update is spanned by all its meaningful directions (see `subspace`), of which a dense ΔW keeps
    the top 64. An energy share needs all of ΔW, and is missing where singular vectors alone were kept. None of this
    depends on the scale of an update.

    The p-value has no null: under chance alone it is uniform. It has more draws where it is small
    (`lorabench.linalg.permutation`), at most 999 to 9,999, the more the smaller the matrices. It is small where the two
    share directions, and also where the same coordinates are large in both: equal variances are enough.
    `p_value_corrected` is over all layers and both sides of the pair (Benjamini and Hochberg 1995).
    """

    needs: ClassVar[Literal["layer", "pair"]] = "pair"
    version: ClassVar[int] = 2
    metrics: ClassVar[dict[str, str]] = {
        "phi_full": "φ(p, q) of all meaningful directions",
        "phi_first": "φ(1, 1): squared cosine between the two top directions",
        "energy_a_in_b": "share of ‖ΔW_a‖² in the subspace of b",
        "energy_b_in_a": "share of ‖ΔW_b‖² in the subspace of a",
        "p_value": "permutation test of the top 64 directions; equal variances of the coordinates are enough to reject",
        "p_value_corrected": "p_value over all layers and sides of the pair, corrected after Benjamini and Hochberg",
    }

    def compute(self, *layers: LayerSVD) -> list[dict[str, Any]]:
        a, b = layers
        return [row for place in directions(a, b, limit=None) for row in _side(a, b, *place)]

    def over_layers(self, frame: pd.DataFrame) -> pd.DataFrame:
        import pandas as pd

        from lorabench.linalg.permutation import corrected

        name = "p_value_corrected"
        tests = frame[frame["metric"] == "p_value"]
        values = tests.groupby(["run_a", "run_b"], observed=True)["value"].transform(corrected)
        words = pd.CategoricalDtype([*dict.fromkeys(frame["metric"]), name])
        both = [frame.astype({"metric": words}), tests.assign(metric=name, value=values).astype({"metric": words})]
        return pd.concat(both).sort_index(kind="stable", ignore_index=True)


def _side(a: LayerSVD, b: LayerSVD, side: str, U: Tensor, V: Tensor) -> list[dict[str, Any]]:
    from lorabench.linalg.decompose import subspace_similarity
    from lorabench.linalg.nulls import energy_chance, similarity_chance
    from lorabench.linalg.permutation import permutation_p_value

    (d, p), q = U.shape, V.shape[1]
    phi = subspace_similarity(U, V)
    mean, std = similarity_chance(p, q, d)
    in_b, in_a = (energy_chance(layer.svd.S.numpy(), count, d) for layer, count in ((a, q), (b, p)))
    rows = [
        {"metric": "phi_full", "value": float(phi[-1, -1]), "null": mean[-1, -1], "null_std": std[-1, -1]},
        {"metric": "phi_first", "value": float(phi[0, 0]), "null": mean[0, 0], "null_std": std[0, 0]},
        {"metric": "energy_a_in_b", "value": energy_share(a, side, V), "null": in_b[0], "null_std": in_b[1]},
        {"metric": "energy_b_in_a", "value": energy_share(b, side, U), "null": in_a[0], "null_std": in_a[1]},
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
