"""Where the top left singular vectors of W0 + ΔW lie, from the whole SVD of W0 and a ΔW of low rank.

With W0 = X diag(σ) Yᵀ, ΔW = U diag(s) Vᵀ and P = W0 V,

    (W0 + ΔW)(W0 + ΔW)ᵀ = X diag(σ²) Xᵀ + [Us P] C [Us P]ᵀ,    C = (I I; I 0),

so in the coordinates of X it is a diagonal D and a term of rank 2r, F C Fᵀ with F = Xᵀ [Us P]: two products with
large matrices, and everything else is small. An eigenvector y of it, with eigenvalue λ, has the coordinates
(λ - D)⁻¹ F z, z = C Fᵀ y; a Rayleigh-Ritz step gives λ and z, and these the vectors (one step of the secular equation
of a modified eigenproblem, Golub 1973, section 5, with r in the place of 1).

Shapes: M out features, N in features, R = min(M, N), r rank of ΔW, w wanted vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorabench.linalg.decompose import ThinSVD
from lorabench.linalg.krylov import transposed_product

HEAD = 4
"""So many times the wanted vectors are taken as they are; the others only as far as ΔW mixes them in."""
MARGIN = 1.02
"""Eigenvalues are taken to stand so far above all those that are not in the head."""


def is_small(shape: tuple[int, int], rank: int, w: int) -> bool:
    """Whether what is not a product with a large matrix is little beside it."""
    return 2 * (HEAD * w + 4 * rank) <= min(shape)


def top_left(weight: Tensor, S: Tensor, left: Tensor, delta: ThinSVD, w: int) -> Tensor:
    """The top w left singular vectors (M, w) of `weight` (M, N) + ΔW, about as exact as `left` is.

    `S` (R,) and `left` (M, R): singular values and left vectors of `weight`; `delta`: ΔW, all of its r triplets.
    """
    unit = 2.0 ** float(torch.frexp(torch.maximum(S[0], delta.S[0])).exponent)  # squares neither overflow nor vanish
    U = delta.U * (delta.S / unit).to(delta.U.dtype)
    X = torch.cat([U, weight @ (delta.Vh.mT / unit)], 1)
    F, D, beyond = transposed_product(left, X), (S / unit).square(), None
    if weight.shape[0] > weight.shape[1]:  # ΔW may reach where W0 does not
        beyond = torch.linalg.qr(U - left @ F[:, : U.shape[1]]).Q
        F, D = torch.cat([F, beyond.mT @ X]), torch.cat([D, D.new_zeros(beyond.shape[1])])
    coordinates = _coordinates(D, F, w)
    found = left @ coordinates[: left.shape[1]]
    return found if beyond is None else found + beyond @ coordinates[left.shape[1] :]


def _coordinates(D: Tensor, F: Tensor, w: int) -> Tensor:
    """The top w eigenvectors (R, w) of diag(D) + F C Fᵀ; D in float64, descending, F (R, 2r) in float32."""
    head = min(HEAD * w, len(D) - 1)
    tail, tail_D = F[head:], D[head:]
    basis = torch.cat([tail, (tail_D / tail_D[0].clamp_min(1e-12)).to(F.dtype)[:, None] * tail], 1)
    for _ in range(2):
        Q = torch.linalg.qr(basis).Q
        values, vectors, z = _ritz(D, F, head, Q, w)
        distance = values.clamp_min(MARGIN * tail_D[0]) - tail_D[:, None]
        basis = (tail @ z.to(F.dtype)) / distance.clamp_min(1e-12).to(F.dtype)
    return torch.cat([vectors[:head].to(F.dtype), Q @ vectors[head:].to(F.dtype)])


def _ritz(D: Tensor, F: Tensor, head: int, Q: Tensor, w: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rayleigh-Ritz on the first `head` unit vectors and, below them, the columns of `Q`: λ, vectors, z."""
    r = F.shape[1] // 2
    f = torch.cat([F[:head], Q.mT @ F[head:]]).double()
    f_C = torch.cat([f[:, :r] + f[:, r:], f[:, :r]], 1)
    small = f_C @ f.mT
    small[:head, :head] += torch.diag(D[:head])
    small[head:, head:] += (Q.mT @ (D[head:, None].to(Q.dtype) * Q)).double()
    values, vectors = (found.flip(-1)[..., :w] for found in torch.linalg.eigh(small))
    return values, vectors, f_C.mT @ vectors
