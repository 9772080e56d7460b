"""How PEFT's tuners make ΔW of their tensors: factors where those are thinner than ΔW, else dense.

AdaLoRA: s B diag(E) A. LoHa: s (B1 A1) ⊙ (B2 A2). LoKr: s W1 ⊗ W2. VeRA: diag(b) B diag(d) A, of which the file must
hold the shared A and B (`save_projection`), and the base the shapes. IA3: W0 scaled by row or by column. OFT:
W0 (Rᵀ - I) with a block-diagonal rotation R.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorabench.products import hadamard, kronecker
from lorabench.readers._peft_config import by_pattern

if TYPE_CHECKING:
    from lorabench.readers._peft_tuners import Module

Factored = tuple[Tensor, Tensor | None]
"""(B, A), or (ΔW, None)."""
Form = Callable[["Module"], Factored]
Outline = Callable[["Module"], tuple[int, int]]
"""(M, N) from the shapes of the tensors."""
NEED_BASE = ("IA3", "OFT", "VERA")


def _adalora(module: Module) -> Factored:
    """s = α / init_r, whatever is left of the directions, as in PEFT; of a matrix that has lost all, one of zero."""
    B, A, E = module.read("lora_B"), module.read("lora_A"), module.read("lora_E")
    alpha, start = module.config["lora_alpha"], float(module.config["init_r"])
    if not len(E):
        return B.new_zeros(B.shape[0], 1), A.new_zeros(1, A.shape[1])
    return B * ((alpha if alpha > 0 else start) / (start + 1e-5)), A * E.reshape(-1, 1)


def _adalora_shape(module: Module) -> tuple[int, int]:
    return module.sizes("lora_B")[0], module.sizes("lora_A")[1]


def _loha(module: Module) -> Factored:
    """A Tucker core t (r, r, height, width) of a convolution makes it dense."""
    scale = _scale(module)
    parts = [module.read(part) for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")]
    if "hada_t1" not in module.names:
        B, A = hadamard(*parts)
        return B * scale, A
    first = _tucker(module.read("hada_t1"), *parts[:2])
    return (first * _tucker(module.read("hada_t2"), *parts[2:])).flatten(1) * scale, None


def _loha_shape(module: Module) -> tuple[int, int]:
    a, b = module.sizes("hada_w1_a"), module.sizes("hada_w1_b")
    return (a[1], b[1] * math.prod(module.sizes("hada_t1")[2:])) if "hada_t1" in module.names else (a[0], b[1])


def _lokr(module: Module) -> Factored:
    """W2 of a convolution is (b, d, height, width): the Kronecker product is over the first two."""
    scale = _scale(module)
    first = _whole_or_pair(module, "lokr_w1")
    if "lokr_t2" in module.names:
        second: Any = _tucker(module.read("lokr_t2"), module.read("lokr_w2_a"), module.read("lokr_w2_b")).flatten(1)
    else:
        second = _whole_or_pair(module, "lokr_w2")
    B, A = kronecker(first, second)
    return B * scale, A


def _lokr_shape(module: Module) -> tuple[int, int]:
    first, second = _kron_sizes(module, "lokr_w1"), _kron_sizes(module, "lokr_w2")
    if "lokr_t2" in module.names:
        a, b = module.sizes("lokr_w2_a"), module.sizes("lokr_w2_b")
        second = a[1], b[1] * math.prod(module.sizes("lokr_t2")[2:])
    return first[0] * second[0], first[1] * second[1]


def _kron_sizes(module: Module, part: str) -> tuple[int, int]:
    if part in module.names:
        sizes = module.sizes(part)
        return sizes[0], math.prod(sizes[1:])
    return module.sizes(f"{part}_a")[0], module.sizes(f"{part}_b")[1]


def _whole_or_pair(module: Module, part: str) -> Tensor | tuple[Tensor, Tensor]:
    if part in module.names:
        return module.read(part).flatten(1)
    return module.read(f"{part}_a"), module.read(f"{part}_b")


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(out, in, height, width)"""
    return torch.einsum("ijkl,ip,jr->prkl", core, a, b)


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


FORMS: dict[str, tuple[Form, Outline]] = {
    "ADALORA": (_adalora, _adalora_shape),
    "LOHA": (_loha, _loha_shape),
    "LOKR": (_lokr, _lokr_shape),
    "VERA": (_vera, _shape_in_base),
    "IA3": (_ia3, _shape_in_base),
    "OFT": (_oft, _shape_in_base),
}
