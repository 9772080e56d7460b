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
    """Rows {side, dim_a, dim_b, index, angle, grassmann} and of each of the two what chance gives, radians.

    `index` counts the min(dim_a, dim_b) principal angles from 1, the smallest first; `grassmann` = √Σ angle², the
    same on every row of a side. The subspaces are all meaningful directions of each update, at most 64
    (see `subspace`). Chance is simulated, of 16 to 256 pairs of random subspaces of these dimensions: `_chance` is the
    mean, `_chance_std` the standard deviation of one pair, `_chance_error` the standard error of that mean.
    """

    needs: ClassVar[Literal["layer", "pair"]] = "pair"
    version: ClassVar[int] = 3
    values: ClassVar[dict[str, tuple[str, ...]]] = {
        name: (f"{name}_chance", f"{name}_chance_std", f"{name}_chance_error") for name in ("angle", "grassmann")
    }
    columns: ClassVar[dict[str, str]] = {
        "dim_a": "directions of run a: all meaningful ones, at most 64",
        "dim_b": "directions of run b",
        "angle": "principal angle number `index`, radians, the smallest first",
        "angle_chance": "its mean over random subspaces of these dimensions",
        "angle_chance_std": "its standard deviation over random subspaces",
        "angle_chance_error": "standard error of the simulated mean `angle_chance`",
        "grassmann": "Grassmann distance: root of the sum of squared principal angles, radians",
        "grassmann_chance": "its mean over random subspaces",
        "grassmann_chance_std": "its standard deviation over random subspaces",
        "grassmann_chance_error": "standard error of the simulated mean `grassmann_chance`",
    }

    def compute(self, *layers: LayerSVD) -> list[dict[str, Any]]:
        import numpy as np

        from lorabench.linalg.decompose import grassmann_distance, principal_angles
        from lorabench.linalg.nulls import angle_chance

        rows = []
        for side, a, b in directions(*layers):
            (d, p), q = a.shape, b.shape[1]
            angles = principal_angles(a, b)
            angle, distance = angle_chance(min(p, q), max(p, q), d)
            rows.append(
                {
                    "side": side,
                    "dim_a": p,
                    "dim_b": q,
                    "index": np.arange(1, len(angles) + 1, dtype=np.int16),
                    "angle": angles.numpy(),
                    "angle_chance": angle.mean,
                    "angle_chance_std": angle.std,
                    "angle_chance_error": angle.error,
                    "grassmann": grassmann_distance(angles),
                    "grassmann_chance": float(distance.mean),
                    "grassmann_chance_std": float(distance.std),
                    "grassmann_chance_error": float(distance.error),
                }
            )
        return rows


EXAMPLE = Angles()
