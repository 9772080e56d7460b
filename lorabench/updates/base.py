"""W0 of one layer with its SVD, and W0 + ΔW: what analyses see of the weights that an update changes.

Shapes: M out features, N in features, R = min(M, N), K <= R kept right vectors, k triplets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lorabench.linalg import perturbed
from lorabench.linalg.decompose import ThinSVD, thin_svd
from lorabench.linalg.krylov import OVERSAMPLING, Matrix, Plus, top_svd, transposed_product
from lorabench.linalg.rotations import in_random_directions, turned
from lorabench.updates import stored
from lorabench.updates.layer import LayerSVD
from lorabench.updates.update import Update

KEEP = 256
"""Singular vectors of W0 that are kept in float32 on both sides."""
TUNED_VECTORS = 32
"""Singular vectors of W0 + ΔW that analyses look at."""
PRINCIPAL = 16
"""The rank of W0's approximation that has its principal weights: one of so many of the shorter side."""
LARGE = 1024
"""Shorter side from which on a dense matrix is worth several threads, or the way to a GPU."""
DRAWS, FEW_DRAWS = 8, 4
"""Random updates that chance is told from: of matrices up to SMALL entries, and of larger ones."""
SMALL = 2**18
PERTURBED_TOLERANCE = 5e-4
"""Residual that the rounding of W0's left vectors leaves; measured, cosines are then right to 3e-6, σ to 1e-6."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseLayer:
    """`weight` W0 (M, N), float32; `svd` every singular value and the top K vectors, float32; `left` (M, R) every
    left singular vector, float32, those beyond K rounded to float16: a cosine with one is right to 5e-4, the rounding
    of one entry, and to 5e-5 for vectors that spread over hundreds of entries."""

    weight: Tensor
    svd: ThinSVD
    left: Tensor

    def largest_cosines(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """For each unit column of `Y` (M, k): max over all i of |cos(x_i, y)| with W0's left vectors, and that i."""
        best, where = transposed_product(self.left, Y).abs().max(0)
        return best.clamp_max_(1), where

    def right(self, chosen: Tensor) -> Tensor:
        """The right singular vectors (N, c) of these numbers (c,), ascending from 0.

        Beyond the K kept ones they are W0ᵀ x_i without its part in the span of those, of length 1: the rounding of
        x_i, which σ_1 / σ_i would enlarge, then counts only where σ_i is a hundredth of its neighbours or less.
        """
        kept = self.svd.Vh
        known, others = chosen[chosen < len(kept)], chosen[chosen >= len(kept)]
        rest = transposed_product(self.weight, self.left[:, others])
        for _ in range(2):
            rest = rest - kept.mT @ (kept @ rest)
        return torch.cat([kept[known].mT, rest / torch.linalg.vector_norm(rest, dim=0)], 1)

    @cached_property
    def marked(self) -> stored.Marked:
        """W0's principal weights, those of its approximation of rank min(M, N) / 16 (1 to K), and its smallest ones."""
        k = min(max(1, min(self.weight.shape) // PRINCIPAL), self.svd.U.shape[1])
        return stored.marked(self.weight, self.svd.U[:, :k], self.svd.S[:k], self.svd.Vh[:k])


@dataclass(frozen=True, kw_only=True, eq=False)
class Tuned:
    """A layer's ΔW on its W0."""

    layer: LayerSVD
    base: BaseLayer

    @cached_property
    def svd(self) -> ThinSVD:
        """The top TUNED_VECTORS triplets of W0 + ΔW, the sum not formed where it is large."""
        return top_triplets(self.base, self.layer.svd, self.matrix, TUNED_VECTORS)

    @property
    def matrix(self) -> Matrix:
        """W0 + ΔW."""
        return plus(self.base.weight, self.layer)

    @cached_property
    def nulls(self) -> tuple[Tuned, ...]:
        """The same W0 with all of ΔW's singular values in random directions, of fixed seeds: what chance is told from.

        Eight draws; four where the matrix has more than 2^18 entries; and one alone, which has no standard deviation,
        where such a ΔW is dense, and each draw takes as long as ΔW itself.
        """
        is_large = self.base.weight.numel() > SMALL
        is_dense = bool(self.layer.svd.S[self.layer.svd.U.shape[1] :].any())  # of which only the top vectors are kept
        draws = (1 if is_dense else FEW_DRAWS) if is_large else DRAWS
        return tuple(Tuned(layer=_turned(self.layer, seed, is_dense), base=self.base) for seed in range(draws))

    def delta(self) -> Tensor:
        """ΔW (M, N) in float32: for what needs it entry by entry."""
        update, svd = self.layer.update, self.layer.svd
        return update.dense().float() if update else (svd.U * svd.S[: svd.U.shape[1]].to(svd.U.dtype)) @ svd.Vh

    @cached_property
    def seen(self) -> stored.Seen:
        """What of ΔW is seen in bfloat16."""
        return stored.seen(self.base.weight, self.delta())


def _turned(layer: LayerSVD, seed: int, is_dense: bool) -> LayerSVD:
    """The layer's singular values in random directions."""
    S, count, name = layer.svd.S, layer.svd.U.shape[1], layer.parameter
    if is_dense:
        U, V = (turned(torch.eye(d, count), 2 * seed + side) for side, d in enumerate(layer.shape))
        update = Update(parameter=name, B=in_random_directions(S.float(), *layer.shape, seed))
        return LayerSVD(parameter=name, svd=ThinSVD(U=U, S=S, Vh=V.mT), update=update)
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(d, count, generator=generator)).Q for d in layer.shape)
    return LayerSVD(parameter=name, svd=ThinSVD(U=U, S=S[:count], Vh=V.mT))


def plus(weight: Tensor, layer: LayerSVD) -> Plus:
    """W0 + ΔW, from the update itself, or from its SVD where that is complete. ValueError where neither is there."""
    update, svd = layer.update, layer.svd
    if update is not None:
        A = None if update.A is None else update.A.to(weight.dtype)
        return Plus(weight, update.B.to(weight.dtype), A)
    if not layer.is_complete:
        raise ValueError(f"{layer.parameter}: only some singular vectors of ΔW were kept")
    count = svd.U.shape[-1]
    return Plus(weight, svd.U * svd.S[:count].to(svd.U.dtype), svd.Vh)


def top_triplets(base: BaseLayer, delta: ThinSVD, matrix: Matrix, k: int) -> ThinSVD:
    """The top k of W0 + ΔW: of a ΔW of low rank from W0's whole SVD, else from the top directions of both."""
    device, rank = best_device(matrix.shape), delta.U.shape[1]
    if device.type == "cpu" and rank == len(delta.S) and perturbed.is_small(matrix.shape, rank, k + OVERSAMPLING):
        left = perturbed.top_left(base.weight, base.svd.S, base.left, delta, k + OVERSAMPLING)
        return top_svd(matrix, k, left=left, tolerance=PERTURBED_TOLERANCE)
    start = torch.cat([base.svd.Vh[: k + 8], delta.Vh[: max(16, k)].to(base.svd.Vh.dtype)]).mT[:, : matrix.shape[1]]
    svd = top_svd(matrix.to(device), k, start=start.to(device))
    return ThinSVD(U=svd.U.cpu(), S=svd.S.cpu(), Vh=svd.Vh.cpu())


def best_device(shape: Sequence[int]) -> torch.device:
    """The GPU, where there is one and a matrix of this shape is worth the way to it."""
    worth = min(shape) >= LARGE and torch.cuda.is_available()
    return torch.device("cuda" if worth else "cpu")


def decompose(weight: Tensor) -> BaseLayer:
    """W0 (M, N) with its whole SVD."""
    svd = thin_svd(weight.to(best_device(weight.shape)))
    top = svd.top(KEEP)
    kept = ThinSVD(U=top.U.cpu().contiguous(), S=svd.S.cpu(), Vh=top.Vh.cpu().contiguous())
    return BaseLayer(weight=weight, svd=kept, left=with_exact_top(svd.U.half().cpu(), kept.U))


def with_exact_top(rounded: Tensor, exact: Tensor) -> Tensor:
    """Every left vector (M, R) in float32: `exact` (M, K) those that are kept so, then `rounded` ones, float16."""
    return torch.cat([exact, rounded[:, exact.shape[1] :].float()], 1)
