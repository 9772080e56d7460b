"""What readers are made of: where an adapter lies, and what was found there; files are `tensorfile`'s."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lorabench.config.decode import InputError
from lorabench.config.quote import clip
from lorabench.updates.layer import LayerSVD
from lorabench.updates.readers._peft_config import is_number
from lorabench.updates.tensorfile import TensorFile, Tensors, TorchFile, read_json
from lorabench.updates.update import Update
from lorabench.updates.weightfile import WeightFiles

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CONFIG_FILE",
    "Entry",
    "Found",
    "Other",
    "Source",
    "TensorFile",
    "Tensors",
    "TorchFile",
    "read_json",
]

CONFIG_FILE = "adapter_config.json"
"""That of PEFT, and of others who took up its name."""


class Entry(Protocol):
    """One ΔW in a file, not read yet."""

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N) of ΔW, from the file's header; InputError where its tensors do not fit."""

    def load(self) -> Update | LayerSVD:
        """Read it. InputError where a tensor is missing, or holds NaN or Inf."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Other:
    """A tensor that was trained and saved whole, beside the factors of ΔW; not read yet.

    Heads, norms and biases (`modules_to_save`, `bias`), the rows of single tokens, `MODULE.lora_B.bias`: what a copy of
    the adapter must have too.
    """

    tensors: Tensors
    name: str
    """As the file calls it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.tensors.shape(self.name)

    @property
    def dtype(self) -> str:
        return self.tensors.dtype(self.name)

    def load(self) -> Tensor:
        """As stored. InputError where it holds NaN or Inf."""
        return self.tensors.read(self.name)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where to look for an adapter: a folder or one file, and what the user adds to it."""

    path: Path
    base: Path | None = None
    """The untouched weights: a file or a folder (DoRA, two checkpoints)."""
    alpha: float | None = None
    """α of formats that do not keep theirs."""

    @property
    def folder(self) -> Path:
        """The folder, or that of the file: where a configuration may lie."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def weights(self) -> WeightFiles | None:
        """The untouched weights, not read yet; None where the user gave none."""
        return None if self.base is None else WeightFiles(self.base)

    def files(self, *suffixes: str) -> list[Path]:
        """The file itself, or the folder's files, with these suffixes (`.safetensors`); sorted."""
        candidates = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        return [file for file in candidates if file.suffix in suffixes and file.is_file()]


def numbers(table: Any, where: str) -> dict[str, Any]:
    """A table of numbers by name, some of which may be null. InputError for anything else."""
    if not isinstance(table, dict):
        raise InputError(f"{where} = {clip(table)}: must be a table of numbers")
    for name, value in table.items():
        if value is not None and not is_number(value):
            raise InputError(f"{where}: {clip(name)} = {clip(value)}: must be a number")
    return table


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What a reader has found. All but `format` and `entries` are as in `formats.Adapter`."""

    format: str
    entries: dict[str, Entry]
    scale_source: str | None = None
    notes: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Other] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
