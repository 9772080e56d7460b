"""LoRA on stacked experts: one ΔW an expert.

PEFT's `target_parameters` (`peft.tuners.lora.ParamWrapper`): a weight (E, out, in), or (E, in, out) where the model
says that it is transposed, has A (r E, in), expert by expert, and B (out, r E), as (out, r, E) with the expert last.
Several parameters of one module are wrapped one around the other, in the order in which the model declares them, so
that the innermost, with most `.base_layer`, is the first. Shapes: E experts, r rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorabench.config.decode import InputError
from lorabench.config.quote import clip
from lorabench.updates.readers._entry import Source, Tensors
from lorabench.updates.readers._factors import Layer, Scale, rank_of
from lorabench.updates.readers._peft_config import rank_and_scale
from lorabench.updates.weightfile import some

BASE_LAYER = ".base_layer"
_DECLARED = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
"""In this order, in all models of transformers that have stacked experts."""


class Kept:
    """A file of tensors that keeps the last two it has read, wide: E experts share them."""

    def __init__(self, tensors: Tensors):
        self.file, self.metadata = tensors.file, tensors.metadata
        self.names, self.shape, self.dtype = tensors.names, tensors.shape, tensors.dtype
        self._tensors = tensors
        self._last: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        if name not in self._last:
            tensor = self._tensors.read(name)
            self._last = dict([*self._last.items()][-1:]) | {
                name: tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            }
        return self._last[name]


def bare(module: str) -> str:
    """The module's name in the model, without the wrappers of its parameters."""
    return module.replace(BASE_LAYER, "")


def targeted(config: dict[str, Any], module: str) -> list[str]:
    """Names of the parameters of a module that `target_parameters` may mean."""
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise InputError(f"target_parameters = {clip(targets)}: must be a list of names")
    pairs = [target.rpartition(".") for target in sorted({*targets})]
    return [name for owner, _, name in pairs if not owner or f".{bare(module)}".endswith(f".{owner}")]


def expert_layers(
    config: dict[str, Any], config_file: Any, factors: dict[str, tuple[str, str]], tensors: Tensors, source: Source
) -> Iterator[Layer]:
    """`MODULE.PARAMETER[e].weight` of each expert. `factors`: names of A and B by module, `.base_layer` included."""
    by_module: defaultdict[str, list[str]] = defaultdict(list)
    for module in sorted(factors, key=len, reverse=True):
        by_module[bare(module)].append(module)
    kept = Kept(tensors)
    for module, wrapped in by_module.items():
        names = _in_order(module, wrapped, targeted(config, module), factors, tensors, source)
        for wrapper, name in zip(wrapped, names, strict=True):
            rank, scale = rank_and_scale(config, f"{module}.{name}", config_file)
            yield from _layers(kept, factors[wrapper], f"{module}.{name}", rank, scale)


def _layers(tensors: Tensors, factors: tuple[str, str], parameter: str, rank: int, scale: float) -> Iterator[Layer]:
    A, B = factors
    rows = rank_of(tensors, A)
    if rows % rank:
        raise InputError(f"{tensors.file}: {A}: {rows} rows are not those of experts of rank {rank}")
    count = rows // rank
    for index in range(count):
        yield Layer(
            tensors=tensors,
            parameter=f"{parameter}[{index}].weight" if count > 1 else f"{parameter.removesuffix('.weight')}.weight",
            names={"B": B, "A": A},
            scale=Scale(value=scale, source="config"),
            form=partial(expert, index=index, count=count),
        )


def expert(B: Tensor, A: Tensor, *, index: int, count: int) -> tuple[Tensor, Tensor]:
    """B (out, r E) and A (r E, in) -> B (out, r) and A (r, in) of one expert."""
    rank = len(A) // count
    return B.reshape(len(B), rank, count)[:, :, index], A[index * rank : (index + 1) * rank]


def _in_order(
    module: str,
    wrapped: list[str],
    names: list[str],
    factors: dict[str, tuple[str, str]],
    tensors: Tensors,
    source: Source,
) -> list[str]:
    """Which parameter each wrapper is of, the innermost first. InputError where that is not certain."""
    if len(wrapped) == len(names) == 1:
        return names
    sizes = [(tensors.shape(factors[wrapper][0])[-1:], tensors.shape(factors[wrapper][1])[:1]) for wrapper in wrapped]
    if source.weights is not None:
        stored = {name: _stored(source, f"{module}.{name}") for name in names}
        fitting = [[name for name, shape in stored.items() if {*shape[1:]} == {*a, *b}] for a, b in sizes]
        if all(len(each) == 1 for each in fitting) and len({each[0] for each in fitting}) == len(fitting):
            return [each[0] for each in fitting]
    if len(names) == len(wrapped) and {*names} <= {*_DECLARED}:
        names = sorted(names, key=_DECLARED.index)
        if names != ["gate_up_proj", "down_proj"] or _are_gate_up_and_down(*sizes):
            return names
    which = f"which of its {len(wrapped)} LoRAs is that of {some(names)} is not known: give --base"
    raise InputError(f"{tensors.file}: {module}: {which}")


def _are_gate_up_and_down(first: tuple[Any, Any], last: tuple[Any, Any]) -> bool:
    """Whether the first puts out twice the width that the last takes, by (in, out) of their factors; Llama 4's are
    stored the other way round, and nothing in the file says so."""
    (inputs, outputs), (inner, inner_as_stored) = first, last
    doubled, doubled_as_stored = (tuple(2 * size for size in each) for each in (inner, inner_as_stored))
    return outputs == doubled or inputs == doubled_as_stored


def _stored(source: Source, parameter: str) -> tuple[int, ...]:
    assert source.weights is not None
    name = source.weights.find(parameter)
    return source.weights.stored_shape(name) if name else ()
