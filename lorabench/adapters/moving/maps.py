"""What the ways to move an adapter are made of: a linear map for each side of ΔW, out of the bases' singular vectors.

Shapes: source W0 (M, N), target W0 (M', N'), k singular vectors of each, r rank of ΔW = B A.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabench.linalg.decompose import ThinSVD, one_thread, thin_svd
from lorabench.updates.base import LARGE, best_device

RANK = 320
"""Singular vectors of each base that are used, as in both papers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """The map E = `onto` `of`ᵀ from R^d to R^d', never formed: `onto` (d', k) and `of` (d, k), orthonormal columns."""

    onto: Tensor
    of: Tensor

    def __call__(self, X: Tensor) -> Tensor:
        """E X (d', n) of X (d, n)."""
        return self.onto @ (self.of.mT @ X.to(self.of.dtype))

    @property
    def share(self) -> float:
        """Of a random direction's squared length, what is left on average: k / d."""
        return self.of.shape[1] / self.of.shape[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Move:
    """ΔW' = E_out ΔW E_inᵀ, (M', N'). `signs_known`: whether some weight tells the signs of paired vectors."""

    out: Side
    into: Side
    signs_known: bool = True

    def __call__(self, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """The factors (M', r) and (r, N') of ΔW', of B (M, r) and A (r, N)."""
        return self.out(B), self.into(A.mT).mT

    @property
    def chance(self) -> float:
        """Root mean square of ‖ΔW'‖ / ‖ΔW‖ over random ΔW: of any spectrum, its singular vectors uniform."""
        return (self.out.share * self.into.share) ** 0.5


def top_vectors(weight: Tensor, rank: int) -> ThinSVD:
    """The first `rank` singular vectors of W0 (M, N), and no more than stand above rounding; float32, or float64 where
    W0 is."""
    with one_thread() if min(weight.shape) < LARGE else contextlib.nullcontext():
        svd = thin_svd(weight.to(best_device(weight.shape)), keep=rank)
    count = min(rank, svd.numerical_rank)
    return ThinSVD(U=svd.U[:, :count].cpu(), S=svd.S[:count].cpu(), Vh=svd.Vh[:count].cpu())


def in_step(source: ThinSVD, target: ThinSVD) -> tuple[ThinSVD, ThinSVD, bool]:
    """As many vectors of both, with the target's signs so that pairs point the same way, and whether that is known.

    The pair (u, v) of a singular value is as right as (−u, −v). Where a width is the same in both bases, the cosines
    with the source's tell which; else the largest entry of each u is made positive, which is a mere convention.
    """
    count = min(source.U.shape[1], target.U.shape[1])
    source, target = (ThinSVD(U=s.U[:, :count], S=s.S[:count], Vh=s.Vh[:count]) for s in (source, target))
    sides = [(source.U, target.U), (source.Vh.mT, target.Vh.mT)]
    cosines = [(X * Y.to(X.dtype)).sum(0) for X, Y in sides if X.shape == Y.shape]
    if cosines:
        return source, _signed(target, sum(cosines, torch.zeros(count))), True
    return _signed(source, _largest(source.U)), _signed(target, _largest(target.U)), False


def _largest(U: Tensor) -> Tensor:
    return U.gather(0, U.abs().argmax(0, keepdim=True))[0]


def _signed(svd: ThinSVD, like: Tensor) -> ThinSVD:
    signs = torch.where(like < 0, -1.0, 1.0).to(svd.U.dtype)
    return ThinSVD(U=svd.U * signs, S=svd.S, Vh=signs[:, None] * svd.Vh)
