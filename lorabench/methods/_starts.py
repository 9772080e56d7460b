"""Where LoRA's factors begin that are made of the weights or of data, written into a model that PEFT has attached.

EVA: Paischer et al. 2024, arXiv 2410.07170; CorDA: Yang et al. 2024, arXiv 2406.05223; LoRA-GA: Wang, Yu and Li 2024,
arXiv 2407.05000; MiLoRA: Wang et al. 2024, arXiv 2406.09044.

Shapes: M out features, N in features, r rank, n positions. W0 (M, N), B (M, r), A (r, N); s is the scale of B A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lorabench.config.decode import InputError
from lorabench.methods._peft import ADAPTER, tuner_layers
from lorabench.models import base_model as models
from lorabench.models import weights

if TYPE_CHECKING:
    from torch import Tensor

    from lorabench.spec.run_spec import RunSpec

Layers = list[tuple[str, Any]]
Losses = Sequence[Callable[[], "Tensor"]]
FROM_DATA = ("eva", "corda", "lora_ga")
TAKEN_OUT = ("pissa", "olora", "milora", "corda", "lora_ga")
"""Those of which s B A is not zero, and is taken out of the base."""
DAMPING = 0.01
"""CorDA's, of the mean of the covariance's diagonal, as its authors have it."""
GAMMA = 16.0
"""LoRA-GA's γ, as its authors have it."""
AT_A_TIME = 2**30
"""Bytes of what is summed up over the examples; they are gone through as often as the layers need."""


def check(init: str, model: Any) -> None:
    """InputError for a layer that has not as many directions as its rank asks for."""
    for name, module in tuner_layers(model):
        M, N, rank = module.out_features, module.in_features, module.r[ADAPTER]
        most = {"eva": N, "lora_ga": min(M, N) // 2}.get(init, min(M, N))
        if rank > most:
            raise InputError(f'method.init = "{init}": {name}, {M} by {N}, can have rank {most} at most, not {rank}')


def minor(model: Any) -> None:
    """MiLoRA: s B A is the part of W0 of its r smallest singular values, split evenly."""
    import torch

    for _, module in tuner_layers(model):
        if module.get_base_layer().weight.device.type == "meta":
            return
        rank, scale = module.r[ADAPTER], module.scaling[ADAPTER]
        U, S, Vh = torch.linalg.svd(_weight(module), full_matrices=False)
        root = (S[-rank:] / scale).sqrt()
        _take_out(module, U[:, -rank:] * root, root[:, None] * Vh[-rank:])


def quantization_error(tuned: Any, spec: RunSpec) -> None:
    """LoftQ with one iteration: s B A is the best approximation of rank r of W - Q(W), split evenly."""
    import torch

    if next(tuned.parameters()).device.type == "meta":
        return
    options = {"num_labels": tuned.config.num_labels} if models.new_heads(tuned.get_base_model()) else {}
    with torch.random.fork_rng():  # a new head of the exact base draws its weights
        exact = models.load_base(spec, torch.device("cpu"), options, exact=True)
    for name, module in tuner_layers(tuned):
        lost = exact.get_submodule(name).weight.detach().float().to(module.weight.device)
        lost = lost - weights.dequantized(module.get_base_layer()).float()
        U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
        rank, scale = module.r[ADAPTER], module.scaling[ADAPTER]
        root = (S[:rank] / scale).sqrt()
        module.lora_B[ADAPTER].weight.data.copy_(U[:, :rank] * root)
        module.lora_A[ADAPTER].weight.data.copy_(root[:, None] * Vh[:rank])


def start(init: str, model: Any, losses: Losses) -> None:
    """Write what the examples tell into the factors; all of it is of the untouched base."""
    find = {"eva": _eva, "corda": _corda, "lora_ga": _lora_ga}[init]
    found: list[tuple[Any, Tensor | None, Tensor]] = []
    for layers in _at_a_time(list(tuner_layers(model))):
        found += find(layers, losses)
    for module, B, A in found:
        if B is None:
            module.lora_A[ADAPTER].weight.data.copy_(A)
        else:
            _take_out(module, B, A)


def _eva(layers: Layers, losses: Losses) -> Iterator[tuple[Any, None, Tensor]]:
    """A's rows are the r directions in which a layer's inputs vary most about their mean; B stays zero.

    As in its authors' code the inputs are centred. Every layer keeps its own rank (ρ = 1).
    """
    import torch

    sums: dict[str, list[Tensor]] = {}

    def add(name: str, x: Tensor) -> None:
        x = x.double()
        new = [x.new_tensor(len(x)), x.sum(0), x.T @ x]
        sums[name] = [a + b for a, b in zip(sums[name], new, strict=True)] if name in sums else new

    _go_through(layers, losses, add)
    for name, module in layers:
        rank = module.r[ADAPTER]
        count, total, gram = sums.get(name, [torch.zeros(())] * 3)
        if count <= rank:
            raise InputError(
                f"method.init_examples = {len(losses)}: {name} of rank {rank} is given {int(count)} tokens by them, "
                "and needs more than its rank"
            )
        _, vectors = torch.linalg.eigh(gram - torch.outer(total, total) / count)
        A = vectors.T.flip(0)[:rank]
        largest = A.abs().argmax(1, keepdim=True)
        yield module, None, A * A.gather(1, largest).sign()


def _corda(layers: Layers, losses: Losses) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """s B A = U_r S_r V_rᵀ C⁻¹, where U S Vᵀ = W0 C, and C is the covariance of a layer's inputs, damped.

    This is the instruction-previewed mode: the largest r. As in its authors' code, each example's inputs are divided
    by the largest of them, and C is a mean over the examples; so the split of s B A into B and A is theirs too.
    """
    import torch

    grams: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        x = x.double()
        x = x / x.max().abs()
        grams[name] = grams.get(name, 0) + x.T @ x

    _go_through(layers, losses, add)
    for name, module in layers:
        if name not in grams or not grams[name].isfinite().all():
            raise _untold(name, losses)
        C = grams[name] / len(losses)
        C = C + DAMPING * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
        rank, scale = module.r[ADAPTER], module.scaling[ADAPTER]
        U, S, Vh = torch.linalg.svd(_weight(module).double() @ C, full_matrices=False)
        root = (S[:rank] / scale).sqrt()
        yield module, U[:, :rank] * root, root[:, None] * torch.linalg.solve(C, Vh[:rank].T).T


def _lora_ga(layers: Layers, losses: Losses) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """B = c U[:, r:2r] and A = c V[:, :r]ᵀ, where U S Vᵀ is the gradient of W0 over the examples, c = M^¼ / √γ.

    The first step of B A then goes the way of the gradient's best approximation of rank 2r (theorem 3.1).
    """
    import torch

    held = [module.get_base_layer().weight for _, module in layers]
    for weight in held:
        weight.requires_grad_(True)
    try:
        sums: list[Tensor | None] = [None] * len(held)
        for loss in losses:
            new = torch.autograd.grad(loss(), held, allow_unused=True)
            sums = [a if b is None else b.float() if a is None else a + b for a, b in zip(sums, new, strict=True)]
    finally:
        for weight in held:
            weight.requires_grad_(False)
    for (name, module), gradient in zip(layers, sums, strict=True):
        if gradient is None or not gradient.isfinite().all() or not gradient.any():
            raise _untold(name, losses)
        rank, factor = module.r[ADAPTER], module.out_features**0.25 / math.sqrt(GAMMA)
        U, _, Vh = torch.linalg.svd(gradient.double(), full_matrices=False)
        yield module, factor * U[:, rank : 2 * rank], factor * Vh[:rank]


def _untold(name: str, losses: Losses) -> InputError:
    return InputError(f"method.init_examples = {len(losses)}: they tell nothing of {name}; ask for more of them")


def _at_a_time(layers: Layers) -> Iterator[Layers]:
    """As many layers as can be summed up at once: float64 of (N, N), more than a gradient mostly takes."""
    group: Layers = []
    held = 0
    for name, module in layers:
        size = 8 * module.in_features * max(module.in_features, module.out_features)
        if group and held + size > AT_A_TIME:
            yield group
            group, held = [], 0
        group.append((name, module))
        held += size
    yield group


def _go_through(layers: Layers, losses: Losses, add: Callable[[str, Tensor], None]) -> None:
    """Call `add` with each layer's name and inputs (n, N), example by example."""
    import torch

    def watch(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda _, inputs: add(name, inputs[0].detach().flatten(0, -2))

    hooks = [module.get_base_layer().register_forward_pre_hook(watch(name)) for name, module in layers]
    try:
        with torch.no_grad():
            for loss in losses:
                loss()
    finally:
        for hook in hooks:
            hook.remove()


def _weight(module: Any) -> Tensor:
    """W0 (M, N) in float32."""
    return weights.dequantized(module.get_base_layer()).float()


def _take_out(module: Any, B: Tensor, A: Tensor) -> None:
    """Begin at these factors, in the precision in which they are trained, and at W0 less s times their product."""
    factors = [module.lora_B[ADAPTER].weight.data.copy_(B), module.lora_A[ADAPTER].weight.data.copy_(A)]
    kept = _weight(module) - module.scaling[ADAPTER] * factors[0].float() @ factors[1].float()
    weight = module.get_base_layer().weight
    weight.data = kept.to(weight.dtype)
