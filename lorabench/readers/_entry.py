"""What readers are made of: where an adapter lies, what was found there, and tensor files with clear errors."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorabench.decode import InputError
from lorabench.layer import LayerSVD
from lorabench.update import Update


class Entry(Protocol):
    """One ΔW in a file, not read yet."""

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N) of ΔW, from the file's header; InputError where its tensors do not fit."""

    def load(self) -> Update | LayerSVD:
        """Read it. InputError where a tensor is missing, or holds NaN or Inf."""


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

    def files(self, *suffixes: str) -> list[Path]:
        """The file itself, or the folder's files, with these suffixes (`.safetensors`); sorted."""
        candidates = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        return [file for file in candidates if file.suffix in suffixes and file.is_file()]


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What a reader has found. `scale_source` and `notes` are as in `formats.Adapter`."""

    format: str
    entries: dict[str, Entry]
    scale_source: str | None = None
    notes: tuple[str, ...] = ()


class Tensors(Protocol):
    """A file of named tensors, whichever its kind. Errors are InputErrors that name the file and the tensor."""

    file: Path

    @property
    def names(self) -> list[str]:
        """Sorted."""

    @property
    def metadata(self) -> dict[str, str]:
        """What the file's header says of itself; empty where the kind has no such thing."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Tensor:
        """InputError where it is missing, or holds NaN or Inf."""


def open_tensors(file: Path) -> Tensors:
    """A `.safetensors` file, or a PyTorch one (`.bin`, `.pt`, `.pth`) of which nothing but tensors is read."""
    return TensorFile(file) if file.suffix == ".safetensors" else TorchFile(file)


class TensorFile:
    """A safetensors file whose problems are InputErrors that name the file and the tensor. Opening reads the header."""

    def __init__(self, file: Path):
        self.file = file
        try:
            self._handle = safe_open(file, framework="pt")
        except FileNotFoundError:
            raise InputError(f"{file}: no such file") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a whole safetensors file (cut short?): {error}") from None

    @property
    def names(self) -> list[str]:
        return sorted(self._handle.keys())

    @property
    def about(self) -> dict[str, Any]:
        """What lorabench says of a file of its own; empty for any other."""
        return _json_object(self.metadata.get("lorabench", "{}"), f"{self.file}: metadata")

    @property
    def metadata(self) -> dict[str, str]:
        return self._handle.metadata() or {}

    def shape(self, name: str) -> tuple[int, ...]:
        try:
            return tuple(self._handle.get_slice(name).get_shape())
        except SafetensorError:
            raise InputError(f"{self.file}: {name}: no such tensor") from None

    def read(self, name: str) -> Tensor:
        self.shape(name)
        return _finite(self._handle.get_tensor(name), self.file, name)


class TorchFile:
    """A PyTorch file (`torch.save` of a dictionary of tensors), read without unpickling anything but tensors."""

    metadata: dict[str, str] = {}

    def __init__(self, file: Path):
        self.file = file

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        try:
            table = torch.load(self.file, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError:
            raise InputError(f"{self.file}: no such file") from None
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise InputError(f"{self.file}: not a whole PyTorch file of tensors: {error}") from None
        if not isinstance(table, dict):
            raise InputError(f"{self.file}: must hold a dictionary of tensors")
        return {str(name): tensor for name, tensor in table.items() if isinstance(tensor, Tensor)}

    @property
    def names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._tensors:
            raise InputError(f"{self.file}: {name}: no such tensor")
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        self.shape(name)
        return _finite(self._tensors[name], self.file, name)


def _finite(tensor: Tensor, file: Path, name: str) -> Tensor:
    if not tensor.isfinite().all():
        raise InputError(f"{file}: {name}: holds NaN or Inf")
    return tensor


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; InputError where it is none."""
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None
    return _json_object(text, str(file))


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON (cut short?): {error}") from None
    if not isinstance(table, dict):
        raise InputError(f"{where}: must be a JSON object")
    return table
