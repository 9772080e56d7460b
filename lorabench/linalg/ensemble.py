"""One subspace for many updates of one layer: how much of them few directions hold, beside chance and their mean.

Every ΔW_i has the norm 1 here, so that no strong one decides alone. Shapes: d the width of a side, K_i the directions
of update i of N, n = Σ K_i, k wanted directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lorabench.linalg.decompose import ThinSVD
from lorabench.linalg.joint import Joint, join

MOST_DIRECTIONS = 32
"""Of the curve of explained energy."""
EXACT = 512
"""Side of a Gram matrix up to which all eigenvalues are computed."""
BLOCK, BLOCKS = 40, 5
"""Columns and number of the Krylov blocks for a larger one. Measured where eigenvalues lie closest, of 250 random
updates of rank 16 in 2048 dimensions: the first is 0.2% too small, the sum of the top 32 1.1%; chance's as much."""
MOST_COLUMNS, MOST_GROUPS = 256, 16
"""Directions in all of the updates that are left out in turn, and in how many groups at most."""
DRAWS = 16
"""Of the null where it is small; a large one averages itself."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Means over the updates that were left out, each held against the others alone; shares of ‖ΔW‖².

    `shared`: in the top k directions of the others, on one side. `mean_directions`: in the top k directions of the
    others' mean. `beyond_mean`: as `shared`, once the part along the others' mean, a multiple of it, is taken from
    every update; None where nothing is left, as of two. By chance all three are k / d, where no update has to do with
    another. `mean`: that part itself, cos² of ΔW and the others' mean; 1 / (M N) by chance.
    """

    shared: float
    mean_directions: float
    beyond_mean: float | None
    mean: float


def explained(frames: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Share (k,) of Σ ‖ΔW_i‖² in the best 1, 2, …, k directions of one side, k = min(MOST_DIRECTIONS, d, n); float64.

    `frames` (d, K_i) singular vectors of the side, `values` (K_i,) singular values over ‖ΔW_i‖. The running sum of the
    eigenvalues of Σ ΔW_iᵀΔW_i (input) over N: mode 2 of the HOSVD of all updates (De Lathauwer et al. 2000), as in the
    universal weight subspace hypothesis (Kaushik et al. 2025, arXiv 2512.05117).
    """
    X = torch.cat([frame * s.to(frame) for frame, s in zip(frames, values, strict=True)], 1)
    most = min(MOST_DIRECTIONS, *X.shape)
    if min(X.shape) <= EXACT:
        gram = X.double().mT @ X.double() if X.shape[1] < X.shape[0] else X.double() @ X.double().mT
        top = torch.linalg.eigvalsh(gram).flip(-1)[:most]
    else:
        top = _top_eigenvalues(X)[:most]
    return top.clamp_min(0).cumsum(0) / len(frames)


def _top_eigenvalues(X: Tensor) -> Tensor:
    """Of X Xᵀ, by Rayleigh and Ritz in a block Krylov space: from below, the more exact the larger."""
    generator = torch.Generator().manual_seed(0)
    product = X.mT @ torch.randn(X.shape[0], BLOCK, generator=generator).to(X)
    basis: list[Tensor] = []
    products = []
    for _ in range(BLOCKS):
        block = torch.linalg.qr(X @ product).Q
        for other in basis * 2:  # twice: once leaves what rounding has added
            block = block - other @ (other.mT @ block)
        basis.append(torch.linalg.qr(block).Q)
        product = X.mT @ basis[-1]
        products.append(product)
    inside = torch.cat(products, 1)
    return torch.linalg.eigvalsh((inside.mT @ inside).double()).flip(-1)


def explained_by_chance(d: int, values: Sequence[Tensor]) -> Tensor:
    """`explained` (k,) of updates with the same singular values in uniformly random directions."""
    ranks = tuple(len(s) for s in values)
    draws = DRAWS if d * sum(ranks) < 2**20 else 1
    return torch.stack([explained(_random_frames(d, ranks, draw), values) for draw in range(draws)]).mean(0)


@lru_cache(maxsize=2 * DRAWS)
def _random_frames(d: int, ranks: tuple[int, ...], seed: int) -> list[Tensor]:
    """Orthonormal columns (d, K) for each rank, uniformly random; the same for all layers of a width."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.linalg.qr(torch.randn(d, rank, generator=generator)).Q for rank in ranks]


def left_out(svds: Sequence[ThinSVD], k: int) -> dict[str, LeftOut]:
    """For the `input` and the `output` side: each of `sampled` updates against the top `k` directions of the others.

    One by one, or in MOST_GROUPS groups where there are more. Needs two updates or more; none of them zero.
    """
    pairs = [(svd.U * (svd.S[: svd.U.shape[1]] / svd.S.norm()).to(svd.U), svd.Vh) for svd in svds]
    joint, count = join(pairs), min(len(pairs), MOST_GROUPS)
    groups = [list(range(len(pairs)))[start::count] for start in range(count)]
    found: dict[str, list[tuple[float, float, float, float]]] = {"input": [], "output": []}
    sides = {"input": joint, "output": _turned(joint)}
    for group in groups:
        for side, turned in sides.items():
            found[side] += _against_others(turned, group, k)
    return {side: _means(rows) for side, rows in found.items()}


def sampled(ranks: Sequence[int]) -> list[int]:
    """Which of the updates are left out in turn: evenly spread, at least two, MOST_COLUMNS directions in all."""
    count = max(2, min(len(ranks), MOST_COLUMNS // max(ranks)))
    return [place * len(ranks) // count for place in range(min(count, len(ranks)))]


def _turned(joint: Joint) -> Joint:
    """Of the transposed updates."""
    return Joint(
        Q=joint.P, P=joint.Q, B=[A.mT for A in joint.A], A=[B.mT for B in joint.B], dtype=joint.dtype
    )  # fmt: skip


def _against_others(joint: Joint, group: list[int], k: int) -> list[tuple[float, float, float, float]]:
    """`LeftOut`'s numbers for each update of the group, on the side of the cores' columns; NaN for what is None."""
    others = [i for i in range(len(joint.B)) if i not in group]
    mean = torch.cat([joint.B[i] for i in others], 1) @ torch.cat([joint.A[i] for i in others]) / len(others)
    square = float(mean.square().sum())
    along = {i: float(((joint.B[i].mT @ mean) * joint.A[i]).sum()) / square if square else 0.0
             for i in [*others, *group]}  # fmt: skip
    rows = torch.cat([torch.linalg.qr(joint.B[i]).R @ joint.A[i] for i in others])
    weighted = torch.cat([along[i] * joint.B[i] for i in others], 1) @ torch.cat([joint.A[i] for i in others])
    shared, cross, own = rows.mT @ rows, weighted.mT @ mean, mean.mT @ mean
    beyond = shared - cross - cross.mT + sum(along[i] ** 2 for i in others) * own
    grams = (shared, own, beyond) if float(beyond.trace()) > 1e-9 * float(shared.trace()) else (shared, own)
    bases = [torch.linalg.eigh(gram).eigenvectors[:, -k:] for gram in grams]
    return [_shares(joint.B[i], joint.A[i], along[i], mean, bases) for i in group]


def _shares(B: Tensor, A: Tensor, along: float, mean: Tensor, bases: list[Tensor]) -> tuple[float, float, float, float]:
    """Of one update, whose core is `B` (p, K) `A` (K, q), in each of the `bases` (q, k)."""
    whole = float(((B.mT @ B) * (A @ A.mT)).sum())
    inside = [float((B @ (A @ basis)).square().sum()) / whole for basis in bases[:2]]
    in_mean = along**2 * float(mean.square().sum()) / whole
    rest = B @ A - along * mean
    left = float(rest.square().sum())
    is_left = left > 1e-9 * whole and len(bases) > 2
    beyond = float((rest @ bases[2]).square().sum()) / left if is_left else float("nan")
    return inside[0], inside[1], beyond, in_mean


def _means(rows: list[tuple[float, float, float, float]]) -> LeftOut:
    shared, directions, beyond, mean = torch.tensor(rows, dtype=torch.float64).unbind(1)
    some = beyond[~beyond.isnan()]
    return LeftOut(
        shared=float(shared.mean()),
        mean_directions=float(directions.mean()),
        beyond_mean=float(some.mean()) if len(some) else None,
        mean=float(mean.mean()),
    )
