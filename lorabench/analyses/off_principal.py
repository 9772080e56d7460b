"""How far ΔW moves W0's spectrum and turns its principal subspaces, left and right, beside a random update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.analysis import Analysis

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from lorabench.linalg.decompose import ThinSVD
    from lorabench.updates.base import Tuned

TOLERANCE = 3e-6
"""Residual of the vectors of W0 + ΔW, relative to their σ: reinforcement learning turns subspaces by 1e-3 radians."""
KS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class OffPrincipal(Analysis):
    """Rows {metric, side, k, value, null}; `null` is of a random update: ΔW's singular values in random directions.

    `spectral_shift` is ‖σ(W) - σ(W0)‖ / ‖σ(W0)‖ over all singular values, and `spectral_shift_at` over the k largest.
    `angle_largest` and `angle_mean` are of the k principal angles between the top k directions of W0 and those of
    W = W0 + ΔW, radians in [0, π/2] (both: Zhu et al. 2025, arXiv 2511.08567). `rotation_gap` is
    ‖U0ᵀU - V0ᵀV‖ / √(‖U0ᵀU‖² + ‖V0ᵀV‖²) with k directions each: 0 where left and right turn alike, 1 where they turn
    independently (after He and Cao 2025, arXiv 2509.17866, who find them alike). It does not depend on the signs of
    singular vectors. `rotation` and `rotation_gap` without `_at` stand for the largest k, 32 or as many as there are.

    All of the spectrum is computed where the shorter side is at most 1024, or on a GPU: elsewhere it takes seconds a
    layer, and `spectral_shift` is left out. A layer whose ΔW is 0 has no rows.
    """

    needs: ClassVar[Literal["base"]] = "base"
    version: ClassVar[int] = 2
    metrics: ClassVar[dict[str, str]] = {
        "spectral_shift": "‖σ(W) − σ(W0)‖ / ‖σ(W0)‖, all singular values; null: random directions",
        "spectral_shift_at": "the same of the k largest singular values",
        "rotation": "mean principal angle between the top 32 directions of W0 and of W, radians; null: random",
        "angle_mean": "mean principal angle between the top k directions of W0 and of W, radians",
        "angle_largest": "the largest of them, radians",
        "rotation_gap": "‖U0ᵀU − V0ᵀV‖ over √(‖U0ᵀU‖² + ‖V0ᵀV‖²), top 32 directions: 0 where left and right turn "
        "alike, 1 where independently; null: random directions",
        "rotation_gap_at": "rotation_gap of the top k directions",
    }
    per_layer: ClassVar[dict[str, str]] = {"spectral_shift": "", "rotation": "radians", "rotation_gap": ""}

    def compute(self, *layers: Tuned) -> list[dict[str, Any]]:
        (tuned,) = layers
        if not (tuned.layer.svd.numerical_rank and tuned.base.svd.numerical_rank):
            return []
        found, null = (dict(measures(each)) for each in (tuned, tuned.null))
        rows = [(*place, value, null[place]) for place, value in found.items()]
        return [dict(zip(("metric", "side", "k", "value", "null"), row, strict=True)) for row in rows]


def measures(tuned: Tuned) -> Iterator[tuple[tuple[str, str, int], float]]:
    """Each metric's name, side and k, and its value."""
    before, after = tuned.base.svd, top(tuned)
    most = min(after.U.shape[1], before.U.shape[1])
    if (values := whole_spectrum(tuned)) is not None:
        yield ("spectral_shift", "both", len(values)), float(_shifts(before.S.numpy(), values)[-1])
    sides = {
        "input": (before.Vh[:most].mT.double(), after.Vh[:most].mT.double()),
        "output": (before.U[:, :most].double(), after.U[:, :most].double()),
    }
    crosses = [U.mT @ V for U, V in sides.values()]
    shifts, gaps = _shifts(before.S[:most].numpy(), after.S[:most].numpy()), _gaps(*(each.numpy() for each in crosses))
    for k in [*(k for k in KS if k < most), most]:
        yield ("spectral_shift_at", "both", k), float(shifts[k - 1])
        grams = [outside(U, V, cross, k) for (U, V), cross in zip(sides.values(), crosses, strict=True)]
        for side, angles in zip(sides, angles_of(grams), strict=True):
            mean = float(angles.mean())
            yield ("angle_mean", side, k), mean
            yield ("angle_largest", side, k), float(angles[-1])
            if k == most:
                yield ("rotation", side, k), mean
        yield ("rotation_gap_at", "both", k), float(gaps[k - 1])
        if k == most:
            yield ("rotation_gap", "both", k), float(gaps[k - 1])


def outside(U: Tensor, V: Tensor, cross: Tensor, k: int) -> Tensor:
    """Gram matrix (k, k) of what of the first k columns of `V` is outside of those of `U` (d, c); `cross`: UᵀV."""
    rest = V[:, :k] - U[:, :k] @ cross[:k, :k]
    return rest.mT @ rest


def angles_of(grams: list[Tensor]) -> np.ndarray:
    """The principal angles (n, k), ascending, radians, of n pairs of subspaces, by their sines; see `outside`."""
    import numpy as np
    import torch

    squares = torch.linalg.eigvalsh(torch.stack(grams)).numpy()
    return np.arcsin(np.sqrt(squares.clip(0, 1)))


def top(tuned: Tuned) -> ThinSVD:
    """The top triplets of W0 + ΔW, nearer than `tuned.svd` has them: measured, angles are then right to 1e-5."""
    import torch

    from lorabench.linalg.krylov import OVERSAMPLING, top_svd

    guesses, count = tuned.base.svd.U, tuned.svd.U.shape[1]
    if 4 * (count + OVERSAMPLING) > min(tuned.layer.shape):
        return tuned.svd  # of a dense SVD
    left = torch.cat([tuned.svd.U, guesses[:, count : count + OVERSAMPLING]], 1)
    return top_svd(tuned.matrix, count, left=left, tolerance=TOLERANCE)


def whole_spectrum(tuned: Tuned) -> np.ndarray | None:
    """Every singular value of W0 + ΔW, descending, by the float64 Gram matrix of the shorter side; None where large."""
    import torch

    from lorabench.updates.base import LARGE, best_device

    device = best_device(tuned.layer.shape)
    if device.type == "cpu" and min(tuned.layer.shape) > LARGE:
        return None
    W = tuned.base.weight.to(device).double() + tuned.delta().to(device).double()
    gram = W.mT @ W if W.shape[0] > W.shape[1] else W @ W.mT
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt().cpu().numpy()


def _shifts(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """‖σ - σ0‖ / ‖σ0‖ of the first 1, 2, … singular values."""
    import numpy as np

    return np.sqrt(np.square(after - before).cumsum() / np.square(before).cumsum())


def _gaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """‖a - b‖ / √(‖a‖² + ‖b‖²) of the first 1, 2, … rows and columns of square matrices."""
    import numpy as np

    squares = (np.square(a - b), np.square(a) + np.square(b))
    above, below = (each.cumsum(0).cumsum(1).diagonal() for each in squares)
    return np.sqrt(above / below)


EXAMPLE = OffPrincipal()
