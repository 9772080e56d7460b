"""LyCORIS's products, also PEFT's, as factors where those are thinner than ΔW itself.

Yeh et al. 2023, "Navigating Text-To-Image Customization", arXiv 2309.14859, section 3. A pair of factors (M, r) and
(r, N) stands for each matrix; a convolution's is (out, in height width). The scale counts once, as in LyCORIS's
forward pass: its `get_diff_weight` of LoHa and LoKr (4.1.3) multiplies by it twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorabench.linalg.products import Pair, hadamard, kronecker

KERNELS = ("hada_t1", "lokr_t2", "lokr_w2")
"""Names of the tensors that end in a convolution's (height, width)."""


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
    """Hadamard product of two products."""
    return hadamard(*_pair(hada_w1_a, hada_w1_b, hada_t1), *_pair(hada_w2_a, hada_w2_b, hada_t2))


def lokr(
    lokr_w1: Tensor | None = None,
    lokr_w1_a: Tensor | None = None,
    lokr_w1_b: Tensor | None = None,
    lokr_w2: Tensor | None = None,
    lokr_w2_a: Tensor | None = None,
    lokr_w2_b: Tensor | None = None,
    lokr_t2: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Kronecker product of two matrices, either whole or a product."""
    first = _pair(lokr_w1_a, lokr_w1_b) if lokr_w1 is None else lokr_w1.flatten(1)
    return kronecker(first, _pair(lokr_w2_a, lokr_w2_b, lokr_t2) if lokr_w2 is None else lokr_w2.flatten(1))


def _pair(a: Tensor | None, b: Tensor | None, core: Tensor | None = None) -> Pair:
    """A matrix as two factors: given so, or as a Tucker core with a (r, out) and b (r', in)."""
    if a is None or b is None:
        raise ValueError("neither a matrix nor both its factors")
    if core is not None and a.dim() != 2:
        raise ValueError(f"a factor of shape {tuple(a.shape)} beside a core: must be a matrix")
    B, A = (a, b) if core is None else (a.T, torch.einsum("ij...,jn->in...", core, b))
    if B.shape[1] != A.shape[0]:
        raise ValueError("two factors that do not fit each other")
    return B, A.flatten(1)
