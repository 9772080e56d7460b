"""Principal angles and Grassmann distance between the subspaces of two runs' ΔW, beside chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.analyses.subspace import directions
from lorabench.spec.analysis import Analysis

if TYPE_CHECKING:
    from lorabench.updates.layer import LayerSVD


@dataclass(frozen=True, kw_only=True)
class Angles(Analysis):
    """Rows {side, dim_a, dim_b, index, angle, angle_chance, grassmann, grassmann_chance}, radians.

    `index` counts the min(dim_a, dim_b) principal angles from 1, the smallest first; `grassmann` = √Σ angle², the
    same on every row of a side. The subspaces are all meaningful directions of each update, at most 64
    (see `subspace`); chance is the mean over random subspaces of these dimensions.
    """

    needs: ClassVar[Literal["layer", "pair"]] = "pair"
    version: ClassVar[int] = 2
    values: ClassVar[dict[str, tuple[str, ...]]] = {"angle": ("angle_chance",), "grassmann": ("grassmann_chance",)}
    columns: ClassVar[dict[str, str]] = {
        "dim_a": "directions of run a: all meaningful ones, at most 64",
        "dim_b": "directions of run b",
        "angle": "principal angle number `index`, radians, the smallest first",
        "angle_chance": "its mean over random subspaces of these dimensions",
        "grassmann": "Grassmann distance: root of the sum of squared principal angles, radians",
        "grassmann_chance": "its mean over random subspaces",
    }

    def compute(self, *layers: LayerSVD) -> list[dict[str, Any]]:
        import numpy as np

        from lorabench.linalg.decompose import grassmann_distance, principal_angles
        from lorabench.linalg.nulls import angle_chance

        rows = []
        for side, a, b in directions(*layers):
            (d, p), q = a.shape, b.shape[1]
            angles = principal_angles(a, b)
            chance, distance_chance = angle_chance(min(p, q), max(p, q), d)
            rows.append(
                {
                    "side": side,
                    "dim_a": p,
                    "dim_b": q,
                    "index": np.arange(1, len(angles) + 1, dtype=np.int16),
                    "angle": angles.numpy(),
                    "angle_chance": chance,
                    "grassmann": grassmann_distance(angles),
                    "grassmann_chance": distance_chance,
                }
            )
        return rows


EXAMPLE = Angles()
