"""loralib (Microsoft): a PyTorch file of `MODULE.lora_A` and `MODULE.lora_B`, no configuration.

ΔW = s B A with A (r, in), B (out, r), also of embeddings (dim, vocabulary). α is not in the file: `--alpha`, else α = r
is assumed. Two kinds of module hide more, and what the file does not tell is assumed and noted:

- A fused linear (`MergedLinear`) of n blocks of rows, k of them with a LoRA: A (r k, in), B (k out / n, r), so that k
  is the quotient of A's rows and B's columns. n is known where the weight is in the file; else it is taken for 3 where
  k = 2, for k otherwise. Which blocks have one stands nowhere: two of three are taken for q and v (`c_attn`, in the
  paper), others for the first k. Blocks without are rows of zeros. Without the weight, k = 1 looks like a linear.
- A convolution of kernel h x h: A (r h, in h), B (out h, r h), and ΔW is B A read as (out, in h h). Where its weight is
  in the file, it is read as that, of rank r h h; else as the matrix B A, of rank r h.

Source: `loralib/layers.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lorabench.config.quote import counted
from lorabench.updates.readers._entry import Found, Source, Tensors
from lorabench.updates.readers._factors import (
    Form,
    Layer,
    adapter_file,
    by_convention,
    found,
    grouped,
    plain,
    rank_of,
    stems,
)

ASSUMED = "no alpha in the file: α = r is assumed, so that the scale is 1 (--alpha tells another)"


def find(source: Source) -> Found | None:
    """The adapter of one file with such names; None where there is none."""
    tensors = adapter_file(source, lambda tensors: bool(_modules(tensors)))
    if tensors is None:
        return None
    names = frozenset(tensors.names)
    modules = [_Module(tensors, names, name) for name in _modules(tensors)]
    used = {name for module in modules for name in (module.A, module.B)}
    notes = [*_fused_notes(modules), *_convolution_notes(modules)]
    layers = [module.layer(source) for module in modules]
    return found("loralib", layers, assumed=ASSUMED, notes=notes, left_out=names - used)


def _modules(tensors: Tensors) -> list[str]:
    """AdapterHub's names end alike, but have `.loras.NAME` in them."""
    return [name for name in stems(tensors, ".lora_A") if ".loras." not in name]


def _fused_notes(modules: list[_Module]) -> list[str]:
    guessed = [module for module in modules if module.guessed]
    blocks = sorted({", ".join(str(i + 1) for i, on in enumerate(module.on) if on) for module in guessed})
    told = f"LoRA is assumed to be on for blocks of rows {' or '.join(blocks)}"
    return [f"{counted(len(guessed), 'fused linear')}, such as {guessed[0].name}: {told}"] if guessed else []


def _convolution_notes(modules: list[_Module]) -> list[str]:
    count = sum(module.convolution is not None for module in modules)
    told = "rank r h of B A is up to r h h of ΔW (out, in h h) at a kernel h x h"
    return [f"{counted(count, 'convolution')}: {told}"] if count else []


@dataclass(frozen=True, eq=False)
class _Module:
    tensors: Tensors
    names: frozenset[str]
    name: str

    @property
    def A(self) -> str:
        return f"{self.name}.lora_A"

    @property
    def B(self) -> str:
        return f"{self.name}.lora_B"

    @property
    def convolution(self) -> tuple[int, ...] | None:
        """Shape of its weight; None for other modules, and where the file has no weights."""
        weight = f"{self.name}.conv.weight"
        return self.tensors.shape(weight) if weight in self.names else None

    @property
    def num_out(self) -> int | None:
        """Number of out features, where the file has the weight; it may be stored as (in, out)."""
        weight = f"{self.name}.weight"
        if weight not in self.names:
            return None
        shape, width = self.tensors.shape(weight), rank_of(self.tensors, self.A, axis=1)
        return math.prod(shape) // width if width in shape else None

    @property
    def on(self) -> tuple[bool, ...]:
        """Which blocks of rows have a LoRA; (True,) unless fused."""
        rows, columns = rank_of(self.tensors, self.A), rank_of(self.tensors, self.B, axis=1)
        count = rows // columns if rows % columns == 0 else 1
        if self.num_out and self.convolution is None:
            blocks = max(count, self.num_out * count // rank_of(self.tensors, self.B))
        else:
            blocks = 3 if count == 2 else count
        if (count, blocks) == (2, 3):
            return True, False, True
        return tuple(block < count for block in range(blocks))

    @property
    def guessed(self) -> bool:
        return len(self.on) > 1 and not (self.num_out and all(self.on))

    def layer(self, source: Source) -> Layer:
        rows = rank_of(self.tensors, self.A)
        rank = rows // self.convolution[-1] if self.convolution else rows // sum(self.on)
        return Layer(
            tensors=self.tensors,
            parameter=f"{self.name}.weight",
            names={"B": self.B, "A": self.A},
            scale=by_convention(source, rank),
            form=self._form(),
            kernel=self.convolution[2:] if self.convolution else (),
        )

    def _form(self) -> Form:
        if self.convolution:
            return partial(_convolution, shape=self.convolution)
        return partial(grouped, on=self.on) if len(self.on) > 1 else plain


def _convolution(B: Tensor, A: Tensor, *, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Row o of ΔW is the h rows of B A from o h on, side by side: ΔW = [B_0 A, ..., B_{h-1} A] with B_i = B[i::h]."""
    M, N, kernel = shape[0], math.prod(shape[1:]), shape[-1]
    if B.shape[1] * kernel >= min(M, N) or B.shape[0] != M * kernel:  # the latter with groups
        return (B @ A).reshape(M, N), None
    return B.reshape(M, -1), torch.block_diag(*[A] * kernel)
