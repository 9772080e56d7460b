"""The largest singular values and vectors of a matrix that is only multiplied with: never decomposed, never formed.

Shapes: M out features, N in features, k wanted triplets, b columns of a block, m columns of the basis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lorabench.linalg import ThinSVD, thin_svd

OVERSAMPLING = 8
MAX_BLOCKS = 16
TOLERANCE = 1e-4
"""Largest residual ‖W v - σ u‖ of a wanted triplet, relative to its own σ."""
SMALLEST = 0.01
"""Below this share of σ₁ relative to that share: products in float32 round by some 1e-7 · σ₁."""


class Matrix(Protocol):
    """What is asked of a matrix (M, N): its products."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def device(self) -> torch.device: ...

    def to(self, device: torch.device) -> Matrix: ...

    def times(self, X: Tensor) -> Tensor:
        """W X (M, c) of X (N, c)."""

    def transposed_times(self, Y: Tensor) -> Tensor:
        """Wᵀ Y (N, c) of Y (M, c)."""

    def dense(self) -> Tensor:
        """W (M, N) itself, for where it is small or iteration does not converge."""


@dataclass(frozen=True, eq=False)
class Dense:
    """A matrix that is held: `weight` (M, N)."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def to(self, device: torch.device) -> Dense:
        return Dense(self.weight.to(device))

    def times(self, X: Tensor) -> Tensor:
        return self.weight @ X

    def transposed_times(self, Y: Tensor) -> Tensor:
        return self.weight.mT @ Y

    def dense(self) -> Tensor:
        return self.weight


@dataclass(frozen=True, eq=False)
class Plus:
    """`weight` + B A, the sum not formed: `B` (M, r), `A` (r, N); without `A`, B (M, N) is the summand itself."""

    weight: Tensor
    B: Tensor
    A: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def to(self, device: torch.device) -> Plus:
        return Plus(self.weight.to(device), self.B.to(device), None if self.A is None else self.A.to(device))

    def times(self, X: Tensor) -> Tensor:
        return self.weight @ X + (self.B @ X if self.A is None else self.B @ (self.A @ X))

    def transposed_times(self, Y: Tensor) -> Tensor:
        return self.weight.mT @ Y + (self.B.mT @ Y if self.A is None else self.A.mT @ (self.B.mT @ Y))

    def dense(self) -> Tensor:
        return self.weight + (self.B if self.A is None else self.B @ self.A)


def top_svd(
    matrix: Matrix, k: int, *, start: Tensor | None = None, left: Tensor | None = None, tolerance: float = TOLERANCE
) -> ThinSVD:
    """The k largest singular values, with vectors, by block Krylov iteration (Musco and Musco 2015, arXiv 1504.05477).

    `start` (N, c) are guesses of right singular vectors; random columns fill them up. `left` (M, c) are guesses of
    more than k left ones, in the place of all that. It ends when each of the k residuals ‖W v - σ u‖ is at most `tolerance` · max(σ, σ₁ / 100): the error of a vector is then about that over the
    gap between its σ and the next, and σ is that near to a singular value of W. Where this takes more than MAX_BLOCKS
    blocks, or a basis that is not small beside the matrix, the dense SVD is taken instead. Products in float32, the
    small SVD in float64. What is orthogonal to all of `start` to the last digit, and stays so, is not found.
    """
    k = min(k, *matrix.shape)
    block = matrix.times(_start_block(matrix, start, k)) if left is None else left
    for triplets, residual in _expand(matrix, block, k):
        if residual <= tolerance:
            return triplets
    svd = thin_svd(matrix.dense(), keep=k)
    return ThinSVD(U=svd.U, S=svd.S[:k], Vh=svd.Vh)


def _start_block(matrix: Matrix, start: Tensor | None, k: int) -> Tensor:
    """Orthonormal columns (N, b): `start`, filled up with random ones to k and a few more."""
    given = matrix.times(torch.zeros(matrix.shape[1], 0, device=matrix.device)) if start is None else start
    lacking = max(0, k + OVERSAMPLING - given.shape[1])
    generator = torch.Generator().manual_seed(0)
    filling = torch.randn(matrix.shape[1], lacking, generator=generator).to(given)
    return filling if start is None else torch.linalg.qr(torch.cat([start, filling], 1)).Q


def _expand(matrix: Matrix, block: Tensor, k: int) -> Iterator[tuple[ThinSVD, float]]:
    """Rayleigh-Ritz triplets of ever larger Krylov spaces, and their largest residual relative to max(σ, σ₁ / 100).

    The first is spanned by `block` (M, b). With an orthonormal basis Q (M, m) and T = WᵀQ (N, m) = V S Gᵀ, u = Q g and v satisfy Wᵀu = σ v exactly. What is
    left is W v - σ u: how far they are from right, and where the basis grows. Reorthogonalized in full.
    """
    width = min(k + OVERSAMPLING, *matrix.shape)
    if 4 * block.shape[1] > min(matrix.shape):
        return
    Q = torch.linalg.qr(block).Q
    T = matrix.transposed_times(Q)
    unit = 2.0 ** torch.frexp(T.abs().max()).exponent  # σ² may be more than float32 holds, or less
    images = matrix.times(T / unit)
    for _ in range(MAX_BLOCKS):
        found, coefficients = _ritz(Q, T, width)
        S = found.S
        misfit = images @ (unit * coefficients) - found.U * S.to(Q.dtype)
        residual = torch.linalg.vector_norm(misfit, dim=0, dtype=torch.float64)
        relative = residual / S.clamp_min(SMALLEST * S[0]).clamp_min(torch.finfo(Q.dtype).tiny)
        yield ThinSVD(U=found.U[:, :k], S=S[:k], Vh=found.Vh[:k]), float(relative[:k].max())
        if 2 * (Q.shape[1] + width) > min(matrix.shape):
            return
        fresh = misfit / residual.clamp_min(torch.finfo(Q.dtype).tiny).to(Q.dtype)
        for _ in range(2):
            fresh = torch.linalg.qr(fresh - Q @ (Q.mT @ fresh)).Q
        grown = matrix.transposed_times(fresh)
        Q, T = torch.cat([Q, fresh], 1), torch.cat([T, grown], 1)
        images = torch.cat([images, matrix.times(grown / unit)], 1)


def _ritz(Q: Tensor, T: Tensor, k: int) -> tuple[ThinSVD, Tensor]:
    """The k triplets of Q Tᵀ, and C (m, k) with V = T C."""
    P, R = torch.linalg.qr(T)
    V, S, Gh = torch.linalg.svd(R.double(), full_matrices=False)
    scale = S[:k].clamp_min(S[0] * torch.finfo(Q.dtype).eps).clamp_min(torch.finfo(Q.dtype).tiny)
    G = Gh[:k].mT
    triplets = ThinSVD(U=Q @ G.to(Q.dtype), S=S[:k], Vh=(P @ V[:, :k].to(Q.dtype)).mT)
    return triplets, (G / scale).to(Q.dtype)
