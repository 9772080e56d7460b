"""How PEFT's tuners make ΔW of their tensors: factors where those are thinner than ΔW, else dense.

AdaLoRA: s B diag(E) A. LoHa: s (B1 A1) ⊙ (B2 A2). LoKr: s W1 ⊗ W2. VeRA: diag(b) B diag(d) A, of which the file must
hold the shared A and B (`save_projection`), and the base the shapes. IA3: W0 scaled by row or by column. OFT:
W0 (Rᵀ - I) with a block-diagonal rotation R.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorabench.updates.readers._lycoris import loha, lokr
from lorabench.updates.readers._peft_config import by_pattern

if TYPE_CHECKING:
    from lorabench.updates.readers._peft_tuners import Module

Factored = tuple[Tensor, Tensor | None]
"""(B, A), or (ΔW, None)."""
NEED_BASE = ("IA3", "OFT", "VERA")


@dataclass(frozen=True)
class Form:
    """How one tuner makes ΔW."""

    product: Callable[[Module], Factored]
    """ΔW / s."""
    shape: Callable[[Module], tuple[int, int]]
    """(M, N) from the shapes of the tensors."""
    scale: Callable[[Module], float] | None = None
    """s; None where there is none."""


def _adalora(module: Module) -> Factored:
    """Of a matrix that has lost all directions, one of zero."""
    B, A, E = module.read("lora_B"), module.read("lora_A"), module.read("lora_E")
    if not len(E):
        return B.new_zeros(B.shape[0], 1), A.new_zeros(1, A.shape[1])
    return B, A * E.reshape(-1, 1)


def _adalora_shape(module: Module) -> tuple[int, int]:
    return module.sizes("lora_B")[0], module.sizes("lora_A")[1]


def _adalora_scale(module: Module) -> float:
    """α / init_r, whatever is left of the directions, as in PEFT."""
    alpha, start = module.config["lora_alpha"], float(module.config["init_r"])
    return float((alpha if alpha > 0 else start) / (start + 1e-5))


def _product(form: Callable[..., Factored], module: Module) -> Factored:
    return form(**{part: module.read(part) for part in module.names})


def _product_shape(form: Callable[..., Factored], module: Module) -> tuple[int, int]:
    """By the product itself, of tensors without content."""
    B, A = form(**{part: torch.empty(module.sizes(part), device="meta") for part in module.names})
    return B.shape[0], (B if A is None else A).shape[1]


def _scale(module: Module) -> float:
    """α / r, by module where there are patterns."""
    layer, config, file = module.parameter.removesuffix(".weight"), module.config, module.tensors.file
    rank = by_pattern(config, "rank_pattern", layer, config["r"], file)
    return by_pattern(config, "alpha_pattern", layer, config["alpha"], file) / rank


def _vera(module: Module) -> Factored:
    """The shared A and B are cut to each module's size."""
    (M, N), names = module.shape, module.tensors.names
    A, B = (
        module.tensors.read(next(name for name in names if name.startswith(f"base_model.vera_{part}"))).float()
        for part in "AB"
    )
    return module.read("vera_lambda_b")[:, None] * B[:M], module.read("vera_lambda_d")[:, None] * A[:, :N]


def _ia3(module: Module) -> Factored:
    """l is (out, 1), or (1, in) where inputs are scaled."""
    sizes = module.sizes("ia3_l")
    if len(sizes) != 2:
        raise ValueError(f"l {sizes} of a convolution cannot be read")
    return module.base().read(module.parameter) * (module.read("ia3_l") - 1), None


def _oft(module: Module) -> Factored:
    """R is block-diagonal; blocks of one shared rotation repeat it."""
    if module.config.get("coft"):
        raise ValueError("constrained OFT (coft) cannot be read")
    vectors, (_, N) = module.read("oft_R"), module.shape
    size = (1 + math.isqrt(1 + 8 * vectors.shape[1])) // 2
    rotations = _rotations(vectors, size, module.config)
    R = torch.block_diag(*rotations.expand(N // size, size, size))
    return module.base().read(module.parameter) @ (R.T - torch.eye(N)), None


def _rotations(vectors: Tensor, size: int, config: dict[str, Any]) -> Tensor:
    """(I - Q)(I + Q)⁻¹ for each Q, skew-symmetric with a vector above its diagonal; or PEFT's approximation of it.

    That is I + 2 Q + 2 Q² + … + 2 Q^(t - 2) + Q^(t - 1) for t terms; PEFT takes 4 of them where 3 are asked for.
    """
    Q, eye = vectors.new_zeros(len(vectors), size, size), torch.eye(size)
    rows, columns = torch.triu_indices(size, size, 1)
    Q[:, rows, columns] = vectors
    Q = Q - Q.mT
    if not config.get("use_cayley_neumann"):
        return torch.linalg.solve(eye + Q, eye - Q, left=False)
    count = config.get("num_cayley_neumann_terms", 5)
    if count not in range(1, 100):
        raise ValueError(f"num_cayley_neumann_terms = {count}")
    last = 1 if count == 2 else max(count, 4) - 1
    R, power = eye.repeat(len(Q), 1, 1), eye.repeat(len(Q), 1, 1)
    for k in range(1, last + 1 if count > 1 else 1):
        power = power @ Q
        R = R + (1 if k == last and count > 2 else 2) * power
    return R


def _shape_in_base(module: Module) -> tuple[int, int]:
    return module.base().shape(module.parameter)


FORMS = {
    "ADALORA": Form(_adalora, _adalora_shape, _adalora_scale),
    "LOHA": Form(partial(_product, loha), partial(_product_shape, loha), _scale),
    "LOKR": Form(partial(_product, lokr), partial(_product_shape, lokr), _scale),
    "VERA": Form(_vera, _shape_in_base),
    "IA3": Form(_ia3, _shape_in_base),
    "OFT": Form(_oft, _shape_in_base),
}
