"""One subspace for many updates of one layer: how much of them few directions hold, beside chance and their mean.

Every ΔW_i has the norm 1 here, so that no strong one decides alone. Shapes: d the width of a side, K_i the directions
of update i of N, n = Σ K_i, k wanted directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from lorabench.linalg.decompose import ThinSVD
from lorabench.linalg.joint import join

MOST_DIRECTIONS = 32
"""Of the curve of explained energy."""
EXACT = 512
"""Side of a Gram matrix up to which all eigenvalues are computed."""
BLOCK, BLOCKS = 40, 5
"""Columns and number of the Krylov blocks for a larger one. Measured where eigenvalues lie closest, of 250 random
updates of rank 16 in 2048 dimensions: the first is 0.2% too small, the sum of the top 32 1.1%; of 500 in
4096 dimensions 0.7% and 1.7% (`benchmarks/ensemble.py`). Chance's as much."""
TILE = 128
"""Rows that are multiplied at a time."""
MOST_COLUMNS, MOST_GROUPS = 256, 16
"""Directions in all of the updates that are left out in turn, and in how many groups at most."""
ROUNDING = 1e-11
"""Share of a sum of squares: (σ / σ₁)² below `ThinSVD.numerical_rank`."""
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
    rows = torch.cat([frame.mT for frame in frames])
    return _explained(rows, torch.cat([*values])) / len(frames)


def _explained(rows: Tensor, weights: Tensor) -> Tensor:
    """Running sum of the largest eigenvalues of Xᵀ X, X = diag(`weights`) `rows` (n, d), never formed."""
    most = min(MOST_DIRECTIONS, *rows.shape)
    if min(rows.shape) <= EXACT:
        X = rows.double() * weights.double()[:, None]
        top = torch.linalg.eigvalsh(X @ X.mT if len(X) < X.shape[1] else X.mT @ X).flip(-1)
    else:
        top = _top_eigenvalues(rows, weights.to(rows))
    return top[:most].clamp_min(0).cumsum(0)


def _top_eigenvalues(rows: Tensor, weights: Tensor) -> Tensor:
    """By Rayleigh and Ritz in a block Krylov space: from below, the more exact the larger.

    A block costs one pass over `rows`: what it is multiplied with to stand in the small matrix gives the next too.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(rows.shape[1], BLOCK, generator=generator).to(rows)
    _, following = _products(rows, weights, start)
    basis: list[Tensor] = []
    inside = []
    for _ in range(BLOCKS):
        block = torch.linalg.qr(following).Q
        for other in basis * 2:  # twice: once leaves what rounding has added
            block = block - other @ (other.mT @ block)
        basis.append(torch.linalg.qr(block).Q)
        product, following = _products(rows, weights, basis[-1], onward=len(basis) < BLOCKS)
        inside.append(product)
    X = torch.cat(inside)
    return torch.linalg.eigvalsh((X @ X.mT).double()).flip(-1)


def _products(rows: Tensor, weights: Tensor, block: Tensor, onward: bool = True) -> tuple[Tensor, Tensor]:
    """(X `block`)ᵀ (c, n) and, where it goes `onward`, Xᵀ X `block` (d, c) of `block` (d, c).

    So many rows at a time as a core's cache holds, in the order that is quick for few columns. Measured, 8000 rows of
    4096 and 40 columns on one core: 72 ms, as two products of whole matrices 90 to 110 ms.
    """
    across = block.mT.contiguous()
    onto, parts = torch.zeros_like(across), []
    for some, weight in zip(rows.split(TILE), weights.split(TILE), strict=True):
        parts.append((across @ some.mT) * weight)
        if onward:
            onto.addmm_(parts[-1] * weight, some)
    return torch.cat(parts, 1), onto.mT


def explained_by_chance(d: int, values: Sequence[Tensor]) -> Tensor:
    """`explained` (k,) of updates with the same singular values in uniformly random directions."""
    ranks, weights = tuple(len(s) for s in values), torch.cat([*values])
    draws = DRAWS if d * sum(ranks) < 2**20 else 1
    found = [_explained(_random_rows(d, ranks, draw), weights) for draw in range(draws)]
    return torch.stack(found).mean(0) / len(ranks)


@lru_cache(maxsize=2 * DRAWS)
def _random_rows(d: int, ranks: tuple[int, ...], seed: int) -> Tensor:
    """Rows (n, d), orthonormal within each rank, uniformly random; the same for all layers of a width."""
    generator = torch.Generator().manual_seed(seed)
    frames = [torch.linalg.qr(torch.randn(d, rank, generator=generator)).Q for rank in ranks]
    return torch.cat([frame.mT for frame in frames])


def left_out(svds: Sequence[ThinSVD], k: int) -> dict[str, LeftOut]:
    """For the `input` and the `output` side: each of `sampled` updates against the top `k` directions of the others.

    One by one, or in MOST_GROUPS groups where there are more. Needs two updates or more; none of them zero.
    """
    pairs = [(svd.U * (svd.S[: svd.U.shape[1]] / svd.S.norm()).to(svd.U), svd.Vh) for svd in svds]
    joint, count = join(pairs), min(len(pairs), MOST_GROUPS)
    cores = _Cores(B=joint.B, A=joint.A)
    found: dict[str, list[tuple[float, float, float, float]]] = {"input": [], "output": []}
    for start in range(count):
        for side, rows in cores.against_others(range(start, len(pairs), count), k).items():
            found[side] += rows
    return {side: _means(rows) for side, rows in found.items()}


def sampled(ranks: Sequence[int]) -> list[int]:
    """Which of the updates are left out in turn: evenly spread, at least two, MOST_COLUMNS directions in all."""
    count = max(2, min(len(ranks), MOST_COLUMNS // max(ranks)))
    return [place * len(ranks) // count for place in range(min(count, len(ranks)))]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cores:
    """C_i = `B[i]` (p, K_i) `A[i]` (K_i, q) of the updates, with what all groups that are left out have in common."""

    B: Sequence[Tensor]
    A: Sequence[Tensor]

    @cached_property
    def grams(self) -> dict[str, list[Tensor]]:
        """C_iᵀC_i (q, q) of the input side, C_i C_iᵀ (p, p) of the output side."""
        pairs = list(zip(self.B, self.A, strict=True))
        return {
            "input": [A.mT @ ((B.mT @ B) @ A) for B, A in pairs],
            "output": [B @ ((A @ A.mT) @ B.mT) for B, A in pairs],
        }

    @cached_property
    def sums(self) -> dict[str, Tensor]:
        return {side: torch.stack(grams).sum(0) for side, grams in self.grams.items()}

    def against_others(self, group: Sequence[int], k: int) -> dict[str, list[tuple[float, float, float, float]]]:
        """`LeftOut`'s numbers for each update of the group, on both sides; NaN for what is None."""
        others = [i for i in range(len(self.B)) if i not in group]
        As = torch.cat([self.A[i] for i in others])
        mean = torch.cat([self.B[i] for i in others], 1) @ As / len(others)
        square = float(mean.square().sum())
        along = {i: float(((self.B[i].mT @ mean) * self.A[i]).sum()) / square if square else 0.0
                 for i in [*others, *group]}  # fmt: skip
        weighted = torch.cat([along[i] * self.B[i] for i in others], 1) @ As
        squares = sum(along[i] ** 2 for i in others)
        sides = {
            "input": (mean.mT @ mean, weighted.mT @ mean),
            "output": (mean @ mean.mT, weighted @ mean.mT),
        }
        own = _top(sides["input"][0], k)
        of_mean = {"input": own, "output": torch.linalg.qr(mean @ own).Q}
        found = {}
        for side, (gram, cross) in sides.items():
            shared = self.sums[side] - sum(self.grams[side][i] for i in group)
            beyond = shared - cross - cross.mT + squares * gram
            bases = [_top(shared, k), of_mean[side]]
            if float(beyond.trace()) > 1e-9 * float(shared.trace()):
                bases.append(_top(beyond, k))
            turned = side == "output"
            factors = {i: (self.A[i].mT, self.B[i].mT) if turned else (self.B[i], self.A[i]) for i in group}
            found[side] = [_shares(*factors[i], along[i], mean.mT if turned else mean, bases) for i in group]
        return found


def _top(gram: Tensor, k: int) -> Tensor:
    """The eigenvectors (q, k) of the k largest eigenvalues; of fewer, where the others are rounding.

    These would be whatever the update that is left out has alone: the cores' space ends there.
    """
    values, vectors = torch.linalg.eigh(gram)
    return vectors[:, -k:][:, values[-k:] > ROUNDING * values[-1]]


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
