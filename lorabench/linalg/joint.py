"""The updates of one layer by several adapters in one small core: ΔW_t = Q C_t Pᵀ, never formed.

Core space (Panariello et al. 2025, arXiv 2509.17786, section 3): what acts on all ΔW_t alike acts on their cores.
Shapes: M out features, N in features, r_t the rank of adapter t of T, p = min(M, Σ r_t), q = min(N, Σ r_t).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""B (M, r) and A (r, N), the scale in B."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Joint:
    """`Q` (M, p) and `P` (N, q), orthonormal columns; `B` (p, r_t) and `A` (r_t, q). All in float64.

    C_t = `B[t] @ A[t]` (p, q), exactly but for rounding: the bases span what all adapters write and read. `dtype` is
    the factors' own, float32 at least.
    """

    Q: Tensor
    P: Tensor
    B: list[Tensor]
    A: list[Tensor]
    dtype: torch.dtype

    @property
    def total(self) -> Tensor:
        """Σ C_t (p, q)."""
        return torch.cat(self.B, 1) @ torch.cat(self.A)

    def cores(self) -> list[Tensor]:
        """Every C_t (p, q)."""
        return [B @ A for B, A in zip(self.B, self.A, strict=True)]

    def expand(self, B: Tensor, A: Tensor) -> Pair:
        """The factors (M, k) and (k, N) of Q (`B` `A`) Pᵀ in `dtype`, for `B` (p, k) and `A` (k, q)."""
        return (self.Q @ B).to(self.dtype), (A @ self.P.mT).to(self.dtype)

    def rank(self, S: Tensor) -> int:
        """How many of these descending singular values stand above the factors' rounding (`ThinSVD.numerical_rank`)."""
        cut = S[0] * torch.finfo(self.dtype).eps * (len(self.Q) + len(self.P) + 1) ** 0.5
        return int((cut < S).sum())


def join(pairs: Sequence[Pair]) -> Joint:
    """By a QR of [B_1 … B_T] and one of [A_1; …; A_T]ᵀ, in float64: the singular vectors of a sum are wanted to its
    smallest values. ValueError for NaN or Inf and for shapes that do not fit."""
    shapes = {(B.shape[0], A.shape[1]) for B, A in pairs}
    if len(shapes) != 1 or any(B.shape[1] != A.shape[0] for B, A in pairs):
        raise ValueError(f"factors {[(tuple(B.shape), tuple(A.shape)) for B, A in pairs]} are not of one layer")
    dtype = torch.float32
    for pair in pairs:
        for factor in pair:
            dtype = torch.promote_types(dtype, factor.dtype)
    ranks = [B.shape[1] for B, _ in pairs]
    Q, R = torch.linalg.qr(torch.cat([B.double() for B, _ in pairs], 1))
    P, L = torch.linalg.qr(torch.cat([A.double() for _, A in pairs]).mT)
    if not (R.isfinite().all() and L.isfinite().all()):
        raise ValueError("the update holds NaN or Inf, or overflows")
    return Joint(Q=Q, P=P, B=list(R.split(ranks, 1)), A=list(L.mT.split(ranks)), dtype=dtype)
