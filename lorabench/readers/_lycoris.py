"""LyCORIS's products as factors, where those are thinner than ΔW itself.

Yeh et al. 2023, "Navigating Text-To-Image Customization", arXiv 2309.14859, section 3. A pair of factors (M, r) and
(r, N) stands for each matrix; a convolution's is (out, in height width). The scale counts once, as in LyCORIS's
forward pass: its `get_diff_weight` of LoHa and LoKr (4.1.3) multiplies by it twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def locon(lora_up: Tensor, lora_down: Tensor, lora_mid: Tensor) -> Pair:
    """Tucker: up (out, r), core (r, r', height, width), down (r', in)."""
    up, down = lora_up.flatten(1), lora_down.flatten(1)
    return up, torch.einsum("ij...,jn->in...", lora_mid, down).flatten(1)


def loha(
    hada_w1_a: Tensor,
    hada_w1_b: Tensor,
    hada_w2_a: Tensor,
    hada_w2_b: Tensor,
    hada_t1: Tensor | None = None,
    hada_t2: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Hadamard product of two products; its factors are their Khatri-Rao products, of rank r²."""
    B1, A1 = _pair(None, hada_w1_a, hada_w1_b, hada_t1)
    B2, A2 = _pair(None, hada_w2_a, hada_w2_b, hada_t2)
    M, N = B1.shape[0], A1.shape[1]
    if (B2.shape[0], A2.shape[1]) != (M, N):
        raise ValueError("two matrices of different shapes have no Hadamard product")
    if B1.shape[1] * B2.shape[1] >= min(M, N):
        return (B1 @ A1) * (B2 @ A2), None
    return torch.einsum("mr,ms->mrs", B1, B2).reshape(M, -1), torch.einsum("rn,sn->rsn", A1, A2).reshape(-1, N)


def lokr(
    lokr_w1: Tensor | None = None,
    lokr_w1_a: Tensor | None = None,
    lokr_w1_b: Tensor | None = None,
    lokr_w2: Tensor | None = None,
    lokr_w2_a: Tensor | None = None,
    lokr_w2_b: Tensor | None = None,
    lokr_t2: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Kronecker product of two matrices, either whole or a product: (B1 A1) ⊗ (B2 A2) = (B1 ⊗ B2) (A1 ⊗ A2)."""
    B1, A1 = _pair(lokr_w1, lokr_w1_a, lokr_w1_b)
    B2, A2 = _pair(lokr_w2, lokr_w2_a, lokr_w2_b, lokr_t2)
    M, N = B1.shape[0] * B2.shape[0], A1.shape[1] * A2.shape[1]
    if B1.shape[1] * B2.shape[1] >= min(M, N):
        return _kronecker(B1 @ A1, B2 @ A2), None
    return _kronecker(B1, B2), _kronecker(A1, A2)


def _kronecker(left: Tensor, right: Tensor) -> Tensor:
    """As `torch.kron`, which refuses transposed tensors without content."""
    return torch.einsum("ij,kl->ikjl", left, right).reshape(len(left) * len(right), -1)


def _pair(whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None = None) -> Pair:
    """A matrix as two factors: given so, as a Tucker core with a (r, out) and b (r', in), or whole."""
    if whole is not None:
        whole = whole.flatten(1)
        M, N = whole.shape
        identity = torch.eye(min(M, N), dtype=whole.dtype, device=whole.device)
        return (identity, whole) if M <= N else (whole, identity)
    if a is None or b is None:
        raise ValueError("neither a matrix nor both its factors")
    B, A = (a, b) if core is None else (a.T, torch.einsum("ij...,jn->in...", core, b))
    if B.shape[1] != A.shape[0]:
        raise ValueError("two factors that do not fit each other")
    return B, A.flatten(1)
