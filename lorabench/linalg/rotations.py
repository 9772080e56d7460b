"""Random directions for all singular values of a large matrix, without a QR of Gaussian ones (seconds at 4096²)."""

from __future__ import annotations

import torch
from torch import Tensor


def in_random_directions(S: Tensor, M: int, N: int, seed: int = 0) -> Tensor:
    """U diag(S) Vᵀ (M, N) of all min(M, N) singular values, U by 2 × seed and V by one more; in the dtype of `S`."""
    diagonal = S.new_zeros(M, N)
    diagonal.diagonal().copy_(S)
    return turned(turned(diagonal, 2 * seed).mT, 2 * seed + 1).mT


def turned(X: Tensor, seed: int) -> Tensor:
    """`X` (d, n) with its columns turned at random, all alike: an orthogonal matrix by (d, seed) times `X`.

    Three times random signs and a cosine transform, which mixes directions as a uniformly random rotation does for
    what is looked at here (Andoni et al. 2015, arXiv 1509.02897, with Hadamard's transform in its place).
    """
    from scipy.fft import dct

    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        signs = torch.randint(0, 2, (len(X), 1), generator=generator) * 2 - 1
        X = torch.from_numpy(dct((X * signs).numpy(), axis=0, norm="ortho"))
    return X
