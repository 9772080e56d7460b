"""Whether ΔW turns to the top singular spaces of the loss's gradient at W0, of the task and of what is retained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.analysis import Analysis

if TYPE_CHECKING:
    from torch import Tensor

    from lorabench.linalg.decompose import ThinSVD
    from lorabench.linalg.nulls import Simulated
    from lorabench.updates.layer import LayerSVD


@dataclass(frozen=True, kw_only=True)
class Gradient(Analysis):
    """Rows {step, side, metric, value, null, null_std} of runs that keep snapshots, k the final ΔW's rank, at most 16.

    `phi_*` is φ(k, k) of `subspace` between the top k directions of ΔW and of the gradient; `sine_*` is the sine of
    their largest principal angle, ‖P − P'‖ of the projections, which Zhang et al. 2025 (LoRA-One, arXiv 2502.01235)
    follow over training: about 1 at the start. `angle_task_retain` is the smallest principal angle between the
    gradients of the task and of what is retained, in radians, by which Steele 2026 (arXiv 2603.02224) explains
    forgetting. A zero ΔW has no directions, and no rows. Null: random subspaces of these dimensions, mean and standard
    deviation.
    """

    needs: ClassVar[Literal["trajectory"]] = "trajectory"
    version: ClassVar[int] = 2
    metrics: ClassVar[dict[str, str]] = {
        "phi_task": "similarity of ΔW's directions with those of the task's gradient, at the end, in [0, 1]",
        "phi_retain": "similarity with the gradient on what is retained, at the end, in [0, 1]",
        "sine_task": "sine of the largest principal angle with the task's gradient, at the end, in [0, 1]",
        "sine_retain": "sine of the largest principal angle with the gradient on what is retained, at the end",
        "angle_task_retain": "smallest principal angle between the two gradients, in radians, in [0, π/2]",
        "phi_task_at": "phi_task at a step",
        "phi_retain_at": "phi_retain at a step",
        "sine_task_at": "sine_task at a step",
        "sine_retain_at": "sine_retain at a step",
    }
    per_layer: ClassVar[dict[str, str]] = {name: "" for name in metrics if not name.endswith("_at")} | {
        "angle_task_retain": "rad"
    }

    def compute(self, *layers: LayerSVD) -> list[dict[str, Any]]:
        last = layers[-1]
        found = last.gradients
        k = min([last.svd.numerical_rank, last.svd.U.shape[1], *(svd.U.shape[1] for svd in found.values())])
        if not found or not k:
            return []
        rows = []
        for layer in layers:
            own = [row for name, svd in found.items() for row in _beside(layer.svd, svd, k, name)]
            rows += [row | {"step": layer.step, "metric": f"{row['metric']}_at"} for row in own]
            rows += [row | {"step": None} for row in own] if layer is last else []
        if len(found) > 1:
            task, retain = (found[name] for name in ("task", "retain"))
            for side, a, b in _sides(task, retain, k, k):
                angles, chance = _angles(a, b)
                null = {"null": float(chance.mean[0]), "null_std": float(chance.std[0])}
                rows.append({"step": None, "side": side, "metric": "angle_task_retain", "value": angles[0]} | null)
        return rows


EXAMPLE = Gradient()


def _beside(svd: ThinSVD, gradient: ThinSVD, k: int, name: str) -> Iterator[dict[str, Any]]:
    """Of fewer directions, p, that ΔW has so far: φ(p, k), and the largest of p angles."""
    from lorabench.linalg.decompose import subspace_similarity
    from lorabench.linalg.nulls import similarity_chance, sine_chance

    p = min(svd.numerical_rank, svd.U.shape[1], k)
    for side, a, b in _sides(svd, gradient, p, k) if p else ():
        angles, chance = _angles(a, b)
        mean, std = similarity_chance(p, k, len(a))
        phi = {"value": float(subspace_similarity(a, b)[-1, -1]), "null": float(mean[-1, -1]), "null_std": std[-1, -1]}
        std = sine_chance(p, k, len(a)).std
        sine = {"value": math.sin(angles[-1]), "null": math.sin(chance.mean[-1]), "null_std": std[-1]}
        yield {"side": side, "metric": f"phi_{name}"} | phi
        yield {"side": side, "metric": f"sine_{name}"} | sine


def _sides(a: ThinSVD, b: ThinSVD, p: int, q: int) -> list[tuple[str, Tensor, Tensor]]:
    return [("input", a.Vh[:p].mT, b.Vh[:q].mT), ("output", a.U[:, :p], b.U[:, :q])]


def _angles(a: Tensor, b: Tensor) -> tuple[list[float], Simulated]:
    """Principal angles, ascending, and what they are by chance."""
    from lorabench.linalg.decompose import principal_angles
    from lorabench.linalg.nulls import angle_chance

    p, q = sorted((a.shape[1], b.shape[1]))
    angle, _ = angle_chance(p, q, len(a))
    return principal_angles(a, b).tolist(), angle
