"""How far ΔW moves W0's spectrum and turns its principal subspaces, left and right, beside a random update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """Rows {metric, side, k, value, null, null_std}; `null` is of random updates: ΔW's singular values in random
    directions, mean and standard deviation over the draws of `Tuned.nulls`.

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
    version: ClassVar[int] = 3
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
        from lorabench.linalg.nulls import over_draws

        (tuned,) = layers
        if not (tuned.layer.svd.numerical_rank and tuned.base.svd.numerical_rank):
            return []
        names, rows = ("metric", "side", "k", "value", "null", "null_std"), []
        for place, (value, *draws) in measures([tuned, *tuned.nulls]):
            rows.append((*place, value, *over_draws(draws)))
        return [dict(zip(names, row, strict=True)) for row in rows]


def measures(subjects: Sequence[Tuned]) -> Iterator[tuple[tuple[str, str, int], list[float]]]:
    """Each metric's name, side and k, and its values of n updates on one W0."""
    import torch

    before, afters = subjects[0].base.svd, [top(each) for each in subjects]
    most = min(after.U.shape[1] for after in (before, *afters))
    if (spectra := whole_spectra(subjects)) is not None:
        yield ("spectral_shift", "both", len(before.S)), _shift(before.S.numpy(), spectra)
    values = torch.stack([after.S[:most] for after in afters]).numpy()
    sides = {
        "input": (before.Vh[:most].mT.double(), torch.stack([after.Vh[:most].mT for after in afters]).double()),
        "output": (before.U[:, :most].double(), torch.stack([after.U[:, :most] for after in afters]).double()),
    }
    crosses = {side: U.mT @ V for side, (U, V) in sides.items()}
    for k in [*(k for k in KS if k < most), most]:
        yield ("spectral_shift_at", "both", k), _shift(before.S[:k].numpy(), values[:, :k])
        for side, (U, V) in sides.items():
            angles = top_angles(U, V, crosses[side], k)
            yield ("angle_mean", side, k), angles.mean(-1).tolist()
            yield ("angle_largest", side, k), angles[:, -1].tolist()
            if k == most:
                yield ("rotation", side, k), angles.mean(-1).tolist()
        a, b = (crosses[side][:, :k, :k].flatten(1) for side in ("output", "input"))
        gap = ((a - b).norm(dim=1) / (a.square().sum(1) + b.square().sum(1)).sqrt()).tolist()
        yield ("rotation_gap_at", "both", k), gap
        if k == most:
            yield ("rotation_gap", "both", k), gap


def top_angles(U: Tensor, V: Tensor, cross: Tensor, k: int) -> Tensor:
    """The principal angles (n, k) between the first k columns of `U` (d, c) and of `V` (n, d, c), ascending, radians.

    Orthonormal columns in float64; `cross`: UᵀV. By the sines, from the Gram matrix of what of V_k is outside of U_k.
    """
    import torch

    outside = V[..., :k] - U[:, :k] @ cross[..., :k, :k]
    return torch.linalg.eigvalsh(outside.mT @ outside).clamp(0, 1).sqrt().arcsin()


def top(tuned: Tuned) -> ThinSVD:
    """The top triplets of W0 + ΔW, nearer than `tuned.svd` has them: measured, angles are then right to 1e-5."""
    import torch

    from lorabench.linalg.krylov import OVERSAMPLING, top_svd

    guesses, count = tuned.base.svd.U, tuned.svd.U.shape[1]
    if 4 * (count + OVERSAMPLING) > min(tuned.layer.shape):
        return tuned.svd  # of a dense SVD
    left = torch.cat([tuned.svd.U, guesses[:, count : count + OVERSAMPLING]], 1)
    return top_svd(tuned.matrix, count, left=left, tolerance=TOLERANCE)


def whole_spectra(subjects: Sequence[Tuned]) -> np.ndarray | None:
    """Every singular value (n, R) of each W0 + ΔW, descending, by the float64 Gram matrix of the shorter side; None
    where large."""
    import torch

    from lorabench.updates.base import LARGE, best_device

    shape = subjects[0].layer.shape
    device = best_device(shape)
    if device.type == "cpu" and min(shape) > LARGE:
        return None
    values = []
    for tuned in subjects:
        W = tuned.base.weight.to(device).double() + tuned.delta().to(device).double()
        gram = W.mT @ W if W.shape[0] > W.shape[1] else W @ W.mT
        values.append(torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt().cpu())
    return torch.stack(values).numpy()


def _shift(before: np.ndarray, after: np.ndarray) -> list[float]:
    """Of each of the n rows of `after` (n, k)."""
    import numpy as np

    found: list[float] = (np.linalg.norm(after - before, axis=1) / np.linalg.norm(before)).tolist()
    return found


EXAMPLE = OffPrincipal()
