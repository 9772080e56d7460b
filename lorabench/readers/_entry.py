"""What readers are made of: entries that load one layer each, and a safetensors file with clear errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

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
        text = (self._handle.metadata() or {}).get("lorabench", "{}")
        return _json_object(text, f"{self.file}: metadata")

    def shape(self, name: str) -> tuple[int, ...]:
        try:
            return tuple(self._handle.get_slice(name).get_shape())
        except SafetensorError:
            raise InputError(f"{self.file}: {name}: no such tensor") from None

    def read(self, name: str) -> Tensor:
        tensor = self._handle.get_tensor(name)
        if not tensor.isfinite().all():
            raise InputError(f"{self.file}: {name}: holds NaN or Inf")
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
