"""llama.cpp's GGUF files as named tensors. Every problem is an InputError that names the file.

The header is walked here, byte by byte within the file, for the `gguf` package's reader takes what a header claims on
trust; the types of tensors and their dequantization are that package's. Source: ggml's `docs/gguf.md`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorabench.config.decode import InputError
from lorabench.config.quote import clip
from lorabench.updates.tensorfile import check_names, check_regular, checked

GGUF_SUFFIX = ".gguf"
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a value -> its form for `struct`."""
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MAX_DIMS = 4
_MOST_A_BYTE = 8
"""Numbers that ggml packs into a byte, at most."""


@dataclass(frozen=True)
class _Place:
    shape: tuple[int, ...]
    kind: int
    """ggml's number of the type."""
    offset: int


class GGUFFile:
    """A GGUF file. Opening reads the header; `settings` are its values."""

    def __init__(self, file: Path):
        self.file = file
        check_regular(file)
        if file.stat().st_size < 24:
            raise InputError(f"{file}: not a whole GGUF file (cut short?)")
        self._data = np.memmap(file, mode="r")
        self.settings, self._places = self._header()
        check_names(self._places, file)

    @property
    def names(self) -> list[str]:
        return sorted(self._places)

    @cached_property
    def metadata(self) -> dict[str, str]:
        return {name: json.dumps(value) for name, value in self.settings.items() if not isinstance(value, list)}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._place(name).shape

    def dtype(self, name: str) -> str:
        kind = self._kind(name).name
        return _DTYPES.get(kind, kind.lower())

    def read(self, name: str) -> Tensor:
        """As float32, dequantized where it is not stored so."""
        import gguf

        place, kind = self._place(name), self._kind(name)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        count = math.prod(place.shape)
        if not count or place.shape[-1] % block or place.offset + count // block * size > len(self._data):
            raise InputError(f"{self.file}: {name}: {kind.name} {place.shape} is more than the file holds, or no shape")
        stored = np.array(self._data[place.offset : place.offset + count // block * size])
        try:
            values = gguf.dequantize(stored.reshape(*place.shape[:-1], -1), kind)
        except (NotImplementedError, ValueError) as error:
            raise InputError(f"{self.file}: {name}: dtype {kind.name} cannot be read: {error}") from None
        return checked(torch.from_numpy(values.reshape(place.shape).astype(np.float32)), self.file, name)

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            raise InputError(f"{self.file}: {name}: no such tensor")
        return self._places[name]

    def _kind(self, name: str) -> Any:
        import gguf

        number = self._place(name).kind
        if number not in {kind.value for kind in gguf.GGMLQuantizationType}:
            raise InputError(f"{self.file}: {name}: tensors of type {number} are not known")
        return gguf.GGMLQuantizationType(number)

    def _header(self) -> tuple[dict[str, Any], dict[str, _Place]]:
        walk = _Walk(self._data, self.file)
        magic, version = walk.bytes(4), walk.number("I")
        if magic != b"GGUF" or version not in (2, 3):
            raise InputError(f"{self.file}: not a GGUF file of version 2 or 3 in little-endian order")
        num_tensors, num_values = walk.number("Q"), walk.number("Q")
        settings = {walk.text(): walk.value(walk.number("I")) for _ in walk.times(num_values)}
        places = {walk.text(): walk.place() for _ in walk.times(num_tensors)}
        alignment = settings.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
            raise InputError(f"{self.file}: general.alignment = {clip(alignment)}: must be a small number")
        begin = -(-walk.at // alignment) * alignment
        return settings, {n: _Place(p.shape, p.kind, begin + p.offset) for n, p in places.items()}


class _Walk:
    """Reads on from a place in a buffer; InputError at its end."""

    def __init__(self, data: np.memmap[Any, Any], file: Path):
        self._data, self._file, self.at = data, file, 0

    def bytes(self, count: int) -> bytes:
        if count > len(self._data) - self.at:
            raise InputError(f"{self._file}: not a whole GGUF file (cut short?)")
        self.at += count
        return self._data[self.at - count : self.at].tobytes()

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}")))[0]

    def text(self) -> str:
        return self.bytes(self.number("Q")).decode("utf-8", "replace")

    def times(self, count: int) -> Iterator[int]:
        """So often, since each time takes more bytes; InputError at once where the file cannot hold as many."""
        if count > len(self._data):
            raise InputError(f"{self._file}: not a whole GGUF file: claims {count} values")
        return iter(range(count))

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner = self.number("I")
            if inner == _ARRAY:
                raise InputError(f"{self._file}: metadata is nested")
            return [self.value(inner) for _ in self.times(self.number("Q"))]
        if kind not in _SCALARS:
            raise InputError(f"{self._file}: metadata of type {kind} are not known")
        return self.number(_SCALARS[kind])

    def place(self) -> _Place:
        num_dims = self.number("I")
        if num_dims > _MAX_DIMS:
            raise InputError(f"{self._file}: a tensor of {num_dims} dimensions: {_MAX_DIMS} at most")
        dims = [self.number("Q") for _ in range(num_dims)]
        if math.prod(dims) > _MOST_A_BYTE * len(self._data):
            raise InputError(f"{self._file}: a tensor of {tuple(reversed(dims))} is more than the file holds")
        return _Place(tuple(reversed(dims)), self.number("I"), self.number("Q"))
