"""A layer's ΔW out of a few named tensors of a file: the entry that all readers of adapters in the wild share.

Shapes: M out features, N in features, r rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorabench.config.decode import InputError
from lorabench.config.quote import counted
from lorabench.linalg.products import LARGEST
from lorabench.updates.readers._dora import Dora
from lorabench.updates.readers._entry import CONFIG_FILE, Entry, Found, Source, Tensors, read_json
from lorabench.updates.readers._names import Named, open_named
from lorabench.updates.update import DORA_PART, Update

Form = Callable[..., tuple[Tensor, Tensor | None]]
"""Named tensors of a file -> ΔW / s: its factors (M, r) and (r, N), or dense (M, N) and None."""
_TORCH = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """s of ΔW = s B A, and where it came from: `config`, `file`, `assumed` or `--alpha`."""

    value: float
    source: str


def by_convention(source: Source, rank: int) -> Scale:
    """For a file that keeps no α: the user's, else α = r, so that s = 1."""
    if source.alpha is None:
        return Scale(value=1.0, source="assumed")
    return Scale(value=source.alpha / rank, source="--alpha")


def rank_of(tensors: Tensors, name: str, axis: int = 0) -> int:
    """r, the size of one axis of a factor; InputError where it has none."""
    shape = tensors.shape(name)
    if len(shape) <= axis or shape[axis] < 1:
        raise InputError(f"{tensors.file}: {name}: shape {shape} is not that of a factor")
    return shape[axis]


def stems(tensors: Tensors, end: str) -> list[str]:
    """Of the names that end so, what stands before."""
    return [name.removesuffix(end) for name in tensors.names if name.endswith(end)]


def number(tensors: Tensors, name: str) -> float:
    """A tensor of one number."""
    value = tensors.read(name)
    if value.numel() != 1:
        raise InputError(f"{tensors.file}: {name}: shape {tuple(value.shape)}: must be one number")
    return float(value)


def plain(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """B (M, r) and A (r, N); of a convolution B (M, r, 1, 1) and A (r, in, height, width), N = in height width."""
    return B.flatten(1), A.flatten(1)


def grouped(B: Tensor, A: Tensor, *, on: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
    """A fused linear of n equal blocks of rows, those of the k that are `on` with a LoRA of their own.

    B (M k / n, r) and A (r k, N), both stacked by block -> (M, r k), zero where off, and A.
    """
    count, rank = sum(on), B.shape[1]
    blocks = iter(torch.block_diag(*B.reshape(count, -1, rank)).reshape(count, -1, count * rank))
    zeros = B.new_zeros(len(B) // count, count * rank)
    return torch.cat([next(blocks) if flag else zeros for flag in on]), A


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """One ΔW: `names` says which tensor is which argument of `form`; `rows` are those of ΔW to keep (all).

    `kernel` is as in `Update`.
    """

    tensors: Tensors
    parameter: str
    names: dict[str, str]
    scale: Scale | None = None
    form: Form = plain
    rows: range | None = None
    part: str | None = None
    magnitude: str | None = None
    """Of DoRA in PEFT's form: the name of m, one number an output."""
    kernel: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """By `form` itself, on tensors without content."""
        shapes = {role: self.tensors.shape(name) for role, name in self.names.items()}
        try:
            B, A = self.form(**{role: torch.empty(shape, device="meta") for role, shape in shapes.items()})
            fits = B.dim() == 2 and (A is None or (A.dim() == 2 and B.shape[1] == A.shape[0]))
        except (RuntimeError, ValueError, IndexError):
            fits = False
        told = ", ".join(f"{role} {shape}" for role, shape in shapes.items())
        if not fits:
            raise InputError(f"{self.tensors.file}: {self.parameter}: {told} do not fit each other")
        if max(B.numel(), 0 if A is None else A.numel()) > LARGEST:
            raise InputError(f"{self.tensors.file}: {self.parameter}: {told} make a ΔW of more than 2³¹ entries")
        return len(B if self.rows is None else self.rows), (B if A is None else A).shape[1]

    def load(self) -> Update:
        _ = self.shape  # a misfit is told as such
        read = {role: self.tensors.read(name) for role, name in self.names.items()}
        dtypes = {tensor.dtype for tensor in read.values()}
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        B, A = self.form(**{role: tensor.to(wide) for role, tensor in read.items()})
        B = B if self.rows is None else B[self.rows.start : self.rows.stop]
        stored = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return Update(
            parameter=self.parameter,
            part=self.part,
            B=B * (self.scale.value if self.scale else 1.0),
            A=A,
            precision=stored if A is None else None,
            scale=self.scale.value if self.scale else None,
            scale_source=self.scale.source if self.scale else None,
            kernel=self.kernel,
        )


def as_part(layer: Layer) -> Layer:
    """`MODULE[sBA].weight`, the part s B A of DoRA's ΔW."""
    name = f"{layer.parameter.removesuffix('.weight')}[{DORA_PART}].weight"
    return replace(layer, parameter=name, part=DORA_PART)


def as_dora(layer: Layer, source: Source, magnitude: str, *, by_input: bool = False) -> Iterator[Layer | Dora]:
    """The part s B A of DoRA's ΔW; and ΔW itself, where the source has a base with that weight.

    `magnitude` is the name of the tensor of m, one number an output, or `by_input` one an input: that is a norm over
    all rows of a fused linear, which some of them do not tell.
    """
    part = replace(as_part(layer), magnitude=None if by_input else magnitude)
    yield part
    if source.weights is None or not source.weights.find(layer.parameter) or (by_input and layer.rows is not None):
        return
    yield Dora(
        sBA=part, tensors=layer.tensors, magnitude=magnitude, weights=source.weights, parameter=layer.parameter,
        by_input=by_input, rows=layer.rows,
    )  # fmt: skip


def adapter_file(source: Source, recognized: Callable[[Named], bool], *, named: str | None = None) -> Named | None:
    """The one file there that a reader recognizes; None where there is none. InputError where there are several.

    `named`: the file names of a format that has its own, a regular expression; files of other names are not looked at,
    unless given themselves. Formats without look in no folder that has an `adapter_config.json`, and at its PyTorch
    files only where one alone lies there: trainers leave pickles of other things beside weights.
    """
    files, pickles = source.files(".safetensors"), source.files(*_TORCH)
    if source.path.is_dir():
        if named is not None:
            files = [file for file in files + pickles if re.fullmatch(named, file.name)]
            pickles = []
        elif (source.folder / CONFIG_FILE).exists():
            return None
        elif files or len(pickles) > 1:
            pickles = []
    own = [tensors for tensors in map(open_named, files + pickles) if recognized(tensors)]
    if len(own) > 1:
        names = ", ".join(tensors.file.name for tensors in own)
        raise InputError(f"{source.path}: several adapters: name one of {names}")
    return own[0] if own else None


def configuration(source: Source, named: str) -> dict[str, Any]:
    """What `adapter_config.json` says, in the folder or beside the file; empty where there is none.

    `named`: the names of the files of which it speaks, a regular expression; of another it does not, where it lies
    beside one of these.
    """
    file = source.folder / CONFIG_FILE
    if not file.exists() or (is_other_file(source, named) and _lies_there(source.folder, named)):
        return {}
    return read_json(file)


def is_other_file(source: Source, named: str) -> bool:
    """Whether one file is given, and of another name."""
    return source.path.is_file() and not re.fullmatch(named, source.path.name)


def _lies_there(folder: Path, named: str) -> bool:
    return any(re.fullmatch(named, file.name) for file in folder.iterdir())


def found(
    format: str,
    layers: Iterable[Layer | Dora],
    *,
    assumed: str = "",
    dora: str = "ΔW needs W0 by the same names (--base)",
    notes: Iterable[str] = (),
    left_out: Iterable[str] = (),
    config: dict[str, Any] | None = None,
) -> Found:
    """What a reader has found, its scale's source and notes.

    `assumed` is the note where a scale was assumed, `dora` why DoRA's part alone is given; `left_out` and `config` are
    as in `Found`.
    """
    entries: dict[str, Entry] = {}
    scales: list[str] = []
    parts, told = [], list(notes)
    for layer in layers:
        if layer.parameter in entries:
            raise InputError(f"{layer.tensors.file}: {layer.parameter}: more than one ΔW")
        entries[layer.parameter] = layer
        if isinstance(layer, Layer):
            scales += [layer.scale.source] if layer.scale else []
            parts += [layer.parameter] if layer.part else []
    count = sum(isinstance(entry, Layer) for entry in entries.values())
    if guessed := scales.count("assumed"):
        few = f"{guessed} of {counted(count, 'layer')}: " if guessed < count else ""
        told.insert(0, few + assumed)
    if alone := sum(name.replace(f"[{DORA_PART}]", "") not in entries for name in parts):
        told.append(f"DoRA in {counted(alone, 'layer')}: what is read is s B A; {dora}")
    scale_source = "assumed" if guessed else next(iter(scales), None)
    return Found(
        format=format,
        entries=entries,
        scale_source=scale_source,
        notes=tuple(told),
        left_out=tuple(sorted(left_out)),
        config=config or {},
    )
