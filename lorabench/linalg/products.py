"""Products of small matrices as the factors of a larger one: ΔW = B A of LoHa and LoKr, never formed where it is large.

Shapes: M out features, N in features. Each returns (B, A), or (ΔW, None) where factors would be as large. Tensors may
be on the meta device, without content: then only the shapes are told.
"""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""Two factors (rows, r) and (r, columns)."""
LARGEST = 2**31
"""Numbers in a dense product, 8 GiB: that of Kronecker factors may be their square."""


def hadamard(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> tuple[Tensor, Tensor | None]:
    """(B1 A1) ⊙ (B2 A2), of rank up to r1 r2: row i of B is the product of all pairs of row i of B1 and of B2."""
    M, N = B1.shape[0], A1.shape[1]
    if (B2.shape[0], A2.shape[1]) != (M, N):
        raise ValueError(f"matrices {M, N} and {B2.shape[0], A2.shape[1]} have no Hadamard product")
    if B1.shape[1] * B2.shape[1] >= min(M, N):
        _check_size(M, N, B1)
        return (B1 @ A1) * (B2 @ A2), None
    B = (B1[:, :, None] * B2[:, None, :]).flatten(1)
    return B, (A1[:, None, :] * A2[None, :, :]).flatten(0, 1)


def kronecker(first: Tensor | Pair, second: Tensor | Pair) -> tuple[Tensor, Tensor | None]:
    """W1 ⊗ W2, each a matrix or its two factors: (U1 V1) ⊗ (U2 V2) = (U1 ⊗ U2)(V1 ⊗ V2)."""
    (U1, V1), (U2, V2) = _pair(first), _pair(second)
    M, N = U1.shape[0] * U2.shape[0], V1.shape[1] * V2.shape[1]
    if U1.shape[1] * U2.shape[1] >= min(M, N):
        _check_size(M, N, U1)
        return _kron(_whole(first), _whole(second)), None
    return _kron(U1, U2), _kron(V1, V2)


def _kron(left: Tensor, right: Tensor) -> Tensor:
    """As `torch.kron`, which refuses transposed tensors without content."""
    return torch.einsum("ij,kl->ikjl", left, right).reshape(len(left) * len(right), -1)


def _pair(matrix: Tensor | Pair) -> Pair:
    """A matrix by the identity of its smaller side."""
    if isinstance(matrix, tuple):
        return matrix
    rows, columns = matrix.shape
    eye = torch.eye(min(rows, columns), device=matrix.device, dtype=matrix.dtype)
    return (eye, matrix) if rows <= columns else (matrix, eye)


def _whole(matrix: Tensor | Pair) -> Tensor:
    return matrix[0] @ matrix[1] if isinstance(matrix, tuple) else matrix


def _check_size(M: int, N: int, factor: Tensor) -> None:
    if M * N > LARGEST and not factor.is_meta:
        raise ValueError(f"ΔW {M, N} is no product of small factors, and takes {4 * M * N / 2**30:.0f} GiB")
