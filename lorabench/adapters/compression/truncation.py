"""ΔW cut to the smallest rank that keeps a share of its energy Σσ², and written as a LoRA in PEFT's format.

Shapes: M out features, N in features, k the rank that is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lorabench.config.decode import InputError
from lorabench.linalg.decompose import thin_svd
from lorabench.models.weights import is_linear_layer, is_transposed
from lorabench.updates.advice import rank_pattern_for, smallest_rank
from lorabench.updates.formats import decompose
from lorabench.updates.modules import Modules, refusal
from lorabench.updates.old_experts import is_single_expert, of_one_rank
from lorabench.updates.peftfile import Beside, Target, configuration, save_adapter
from lorabench.updates.readers._experts import bare
from lorabench.updates.readers.peft_lora import NORMS_FILE, Factors
from lorabench.updates.stacked import expert_of, parameter_of, stacked, wrapper_of
from lorabench.updates.update import Update, save_updates

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["linear", "embedding"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Cut:
    """The best approximation B A of one ΔW (Eckart and Young 1936) at some energy: B = U√S (M, k), A = √S Vh (k, N).

    `energy` is Σσ² of ΔW, `kept` the part of it in the k values, `lost` ‖ΔW − B A‖_F² of the factors as they are
    written, rounding included. `rank` is that of ΔW's factors before: None if it is dense.
    """

    layer: str
    B: Tensor
    A: Tensor
    energy: float
    kept: float
    lost: float
    rank: int | None
    base_norm: float | None = None

    @property
    def new_rank(self) -> int:
        return self.B.shape[1]


def cut(update: Update, energies: Sequence[float], dtype: torch.dtype = torch.float32) -> list[Cut]:
    """ΔW at each of `energies`, in (0, 1]; nothing where it is 0. The factors are written in `dtype`."""
    svd = decompose(update)
    squares = svd.S.square()
    if not squares[0] > 0:
        return []
    cuts = []
    for energy in energies:
        k = smallest_rank(svd.S.numpy(), energy)
        root = svd.S[:k].sqrt().to(svd.U)
        B, A = (svd.U[:, :k] * root).to(dtype), (root[:, None] * svd.Vh[:k]).to(dtype)
        cuts.append(
            Cut(
                layer=update.layer,
                B=B.contiguous(),
                A=A.contiguous(),
                energy=float(squares.sum()),
                kept=float(squares[:k].sum()),
                lost=_squared_distance(update, B.to(svd.U), A.to(svd.U)),
                rank=None if update.A is None else update.B.shape[1],
                base_norm=update.base_norm,
            )
        )
    return cuts


def _squared_distance(update: Update, B: Tensor, A: Tensor) -> float:
    """‖ΔW − B A‖_F²: of factors as that of [B₀, −B] [A₀; A], whose product is never formed."""
    if update.A is None:
        return float(torch.linalg.vector_norm(update.B - B @ A, dtype=torch.float64)) ** 2
    return float(thin_svd(torch.cat([update.B, -B], 1), torch.cat([update.A, A])).S.square().sum())


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a layer is in its model: which of PEFT's factors it takes."""

    module: str
    """Its name there."""
    shape: tuple[int, int]
    """(M, N) of ΔW."""
    kind: Kind = "linear"
    kernel: tuple[int, ...] = ()
    """Of a convolution: (height, width)."""
    parameter: str | None = None
    """Of stacked experts: what the module's LoRA is of; `module` is then PEFT's name of that."""
    expert: int = 0
    twin: str | None = None
    """The output layer that shares an embedding's weight: a dense ΔW changes both."""


def places(base: nn.Module | None, parameters: Iterable[str], modules: Modules) -> dict[str, Place]:
    """By layer; told from names and weights where no model is known. InputError with each that two factors cannot
    express."""
    found: dict[str, Place] = {}
    problems: list[str] = []
    for parameter in parameters:
        try:
            place = _place(parameter, modules) if base is None else _place_in(base, parameter, modules)
            same = (place.module, place.expert)
            if twins := [layer for layer, other in found.items() if (other.module, other.expert) == same]:
                raise InputError(f"{parameter}: belongs to {place.module}, as {twins[0]} does")
            found[parameter.removesuffix(".weight")] = place
        except InputError as error:
            problems += error.problems
    if problems:
        raise refusal(problems, modules.adapter.source)
    return found


def _place(parameter: str, modules: Modules) -> Place:
    if not parameter.endswith(".weight"):
        raise InputError(f"{parameter}: is not the weight of a module, so that LoRA cannot change it")
    if getattr(modules.entries[parameter], "groups", 1) > 1:
        raise InputError(f"{parameter}: of a grouped convolution, whose B is a part of this one")
    config, entry = modules.adapter.config, modules.entries[parameter]
    if wrapper := wrapper_of(config, entry):
        name, expert = parameter_of(config, parameter), expert_of(parameter)
        return Place(module=wrapper, shape=entry.shape, parameter=name, expert=expert)
    module = modules.module(parameter)
    kind: Kind = "embedding" if modules.embeds(parameter, module) else "linear"
    return Place(module=module, shape=entry.shape, kind=kind, kernel=modules.kernel(parameter))


def _place_in(base: nn.Module, parameter: str, modules: Modules) -> Place:
    from torch import nn

    place = _place(parameter, modules)
    known: dict[str, Any] = dict(base.named_modules())
    module = known.get(bare(place.module))
    if place.parameter and module is not None:
        return place
    if module is None:
        raise InputError(f"{place.module}: {type(base).__name__} has no such layer")
    convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1
    if not (is_linear_layer(module) or isinstance(module, nn.Embedding) or convolution):
        what = f"is a {type(module).__name__}; only linear layers, embeddings and convolutions can be compressed"
        raise InputError(f"{place.module}: {what}")
    expected = tuple(module.weight.flatten(1).shape)[:: -1 if is_transposed(module) else 1]
    if place.shape != expected:
        raise InputError(f"{place.module}: is {place.shape}, and {expected} in {type(base).__name__}")
    if convolution:
        return replace(place, kernel=tuple(module.weight.shape[2:]))
    if isinstance(module, nn.Embedding):
        output: Any = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        factored = isinstance(modules.entries[parameter], Factors)
        tied = output is not None and output.weight is module.weight and not factored
        twin = next(name for name, other in known.items() if other is output) if tied else None
        return replace(place, kind="embedding", twin=twin)
    return replace(place, kind="linear")


@dataclass(frozen=True, kw_only=True, eq=False)
class Carried:
    """What was trained in full, and is carried over as it is: a task head, norms, biases, the rows of tokens."""

    beside: Beside = field(default_factory=Beside)
    names: frozenset[str] = frozenset()
    """Of the parameters, in the source and in the base."""
    updates: tuple[Update, ...] = ()
    """Their ΔW, where it is known."""


def write_adapter(
    folder: Path, cuts: Sequence[Cut], where: dict[str, Place], carried: Carried, options: dict[str, Any]
) -> None:
    """An adapter that plain PEFT loads, with s = 1 in every layer: α is the layer's rank. `options`: of LoraConfig."""
    targets = _targets({each.layer: each for each in cuts}, where)
    targets, rank = of_one_rank(targets)
    config = configuration(targets, carried.beside, rank)
    if rank is None:
        rank, pattern = rank_pattern_for({target.parameter or target.module: target.rank for target in targets})
        config = configuration(targets, carried.beside, rank) | {"rank_pattern": pattern, "alpha_pattern": pattern}
    save_adapter(folder, targets, carried.beside, config | options)
    norms = {_named(where[each.layer]): each.base_norm for each in cuts if each.base_norm is not None}
    (folder / NORMS_FILE).write_text(json.dumps(norms, indent=1))
    if carried.updates:
        save_updates(carried.updates, folder)


def _named(place: Place) -> str:
    """The parameter of ΔW, as it is read from what is written."""
    return f"{place.parameter}[{place.expert}].weight" if place.parameter else f"{place.module}.weight"


def _targets(cuts: dict[str, Cut], where: dict[str, Place]) -> list[Target]:
    """Experts that no token was sent to are there too, at zero: PEFT wants factors of all that it stacks."""
    targets: list[Target] = []
    stacks: dict[tuple[str, str], dict[int, tuple[Tensor, Tensor]]] = {}
    for layer, place in where.items():
        each = cuts.get(layer)
        M, N = place.shape
        B, A = (each.B, each.A) if each else (torch.zeros(M, 1), torch.zeros(1, N))
        if place.parameter:
            stacks.setdefault((place.module, place.parameter), {})[place.expert] = B, A
        elif each or is_single_expert(place.module):
            target = Target(module=place.module, B=B, A=A, rank=len(A), kernel=place.kernel)
            targets.append(replace(target, embedding=place.kind == "embedding"))
        if each and place.twin:
            targets.append(Target(module=place.twin, B=A.mT, A=B.mT, rank=len(A)))
    stacked_targets = [
        stacked(module, parameter, [experts[index] for index in sorted(experts)])
        for (module, parameter), experts in stacks.items()
    ]
    return targets + stacked_targets
