"""ΔW cut to the smallest rank that keeps a share of its energy Σσ², and written as a LoRA in PEFT's format.

Shapes: M out features, N in features, k the rank that is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lorabench.config.decode import InputError
from lorabench.linalg.decompose import thin_svd
from lorabench.models.weights import is_linear_layer, is_transposed
from lorabench.updates.advice import rank_pattern_for, smallest_rank
from lorabench.updates.formats import decompose
from lorabench.updates.peftfile import Beside, Target, configuration, save_adapter
from lorabench.updates.readers._entry import Entry
from lorabench.updates.readers.peft_lora import NORMS_FILE, Factors
from lorabench.updates.update import Update, save_updates
from lorabench.updates.weightfile import WeightFiles, flat_name, llama_cpp_name

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["linear", "embedding"]
_EMBEDDING = re.compile(r"(^|[._])(embed\w*|wte|wpe)$")


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

    kind: Kind = "linear"
    twin: str | None = None
    """The output layer that shares an embedding's weight: a dense ΔW changes both."""


def places(
    source: str, base: nn.Module | None, entries: dict[str, Entry], files: WeightFiles | None = None
) -> dict[str, Place]:
    """By layer; told from their names where no model is known. InputError with each that two factors cannot express."""
    found, problems = {}, []
    for parameter, entry in entries.items():
        layer = parameter.removesuffix(".weight")
        factors = entry if isinstance(entry, Factors) else None
        if parameter == layer:
            problems.append(f"{parameter}: is not the weight of a module, so that LoRA cannot change it")
        elif flat_name(parameter):
            problems.append(f"{layer}: `_` may stand for `.`: convert it first, with --base")
        elif llama_cpp_name(parameter):
            problems.append(f"{layer}: is llama.cpp's name, and not known to have the rows of a module of the model")
        elif "[" in layer:
            problems.append(f"{layer}: is some rows of a fused layer, and no module of its own")
        elif getattr(entry, "kernel", ()) or _is_convolution(parameter, files):
            problems.append(f"{layer}: is a convolution; only linear layers and embeddings can be compressed")
        elif base is not None:
            place = _place_in(base, layer, entry.shape, factored=factors is not None)
            problems += [f"{layer}: {place}"] if isinstance(place, str) else []
            found[layer] = place if isinstance(place, Place) else Place()
        else:
            embeds = "embedding" in factors.A if factors else _EMBEDDING.search(layer)
            found[layer] = Place(kind="embedding" if embeds else "linear")
    if problems:
        raise InputError([f"{source}: {problem}" for problem in problems])
    return found


def _is_convolution(parameter: str, files: WeightFiles | None) -> bool:
    """In the untouched weights; a file may have its ΔW flattened."""
    name = files.find(parameter) if files else None
    return bool(files and name and len(files.stored_shape(name)) == 4)


def _place_in(base: nn.Module, layer: str, shape: tuple[int, int], *, factored: bool) -> Place | str:
    """The layer's place, or why it has none."""
    from torch import nn

    modules: dict[str, Any] = dict(base.named_modules())
    module = modules.get(layer)
    if module is None:
        return f"{type(base).__name__} has no such layer"
    if not (is_linear_layer(module) or isinstance(module, nn.Embedding)):
        return f"is a {type(module).__name__}; only linear layers and embeddings can be compressed"
    expected = tuple(module.weight.shape)[:: -1 if is_transposed(module) else 1]
    if shape != expected:
        return f"is {shape}, and {expected} in {type(base).__name__}"
    if isinstance(module, nn.Embedding):
        output: Any = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        tied = output is not None and output.weight is module.weight and not factored
        return Place(kind="embedding", twin=next(n for n, m in modules.items() if m is output) if tied else None)
    return Place()


@dataclass(frozen=True, kw_only=True, eq=False)
class Carried:
    """What was trained in full, and is carried over as it is: a task head, norms, biases, the rows of tokens."""

    beside: Beside = field(default_factory=Beside)
    names: frozenset[str] = frozenset()
    """Of the parameters, in the source."""
    updates: tuple[Update, ...] = ()
    """Their ΔW, where it is known."""


def write_adapter(
    folder: Path, cuts: Sequence[Cut], where: dict[str, Place], carried: Carried, options: dict[str, Any]
) -> None:
    """An adapter that plain PEFT loads, with s = 1 in every layer: α is the layer's rank. `options`: of LoraConfig."""
    targets = []
    for each in cuts:
        place = where[each.layer]
        embedding = place.kind == "embedding"
        targets.append(Target(module=each.layer, B=each.B, A=each.A, rank=each.new_rank, embedding=embedding))
        if place.twin:
            targets.append(Target(module=place.twin, B=each.A.mT, A=each.B.mT, rank=each.new_rank))
    rank, pattern = rank_pattern_for({target.module: target.rank for target in targets})
    config = configuration(targets, carried.beside, rank) | {"rank_pattern": pattern, "alpha_pattern": pattern}
    save_adapter(folder, targets, carried.beside, config | options)
    norms = {f"{each.layer}.weight": each.base_norm for each in cuts if each.base_norm is not None}
    (folder / NORMS_FILE).write_text(json.dumps(norms, indent=1))
    if carried.updates:
        save_updates(carried.updates, folder)
