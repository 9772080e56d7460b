"""Files of named tensors, whichever their kind, and JSON beside them; every problem is an InputError naming the file.

Nothing is unpickled but tensors. A file may be damaged or hostile: what it claims is held against its size before
anything is read, so that reading takes no more memory than the file is long.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorabench.config.decode import InputError
from lorabench.config.json_file import parse
from lorabench.config.quote import clip, show

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
CONFIG_BYTES = 4 * 2**20
"""No configuration is as large."""
MAX_NAME = 400
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "adapter", "lora")
"""Keys under which checkpoints keep the dictionary of tensors."""
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
           "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # fmt: skip


class Tensors(Protocol):
    """A file of named tensors, whichever its kind. Errors are InputErrors that name the file and the tensor."""

    file: Path

    @property
    def names(self) -> list[str]:
        """Sorted."""

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says of itself: a safetensors header's strings; a PyTorch file's plain values as JSON."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str:
        """As stored: `bfloat16`."""

    def read(self, name: str) -> Tensor:
        """In its own dtype (8-bit floats as float32). InputError where it is missing, holds no floating-point numbers
        (single whole numbers pass, as float32), or holds NaN or Inf."""


def open_tensors(file: Path) -> Tensors:
    """A `.safetensors` file, or a PyTorch one (`.bin`, `.pt`, `.pth`, `.ckpt`)."""
    return TensorFile(file) if file.suffix == ".safetensors" else TorchFile(file)


class TensorFile:
    """A safetensors file. Opening reads the header."""

    def __init__(self, file: Path):
        self.file = file
        check_regular(file)
        try:
            self._handle = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a whole safetensors file (cut short?): {error}") from None
        check_names(self._handle.keys(), file)

    @cached_property
    def names(self) -> list[str]:
        return sorted(self._handle.keys())

    @property
    def about(self) -> dict[str, Any]:
        """What lorabench says of a file of its own; empty for any other."""
        return parse_object(self.metadata.get("lorabench", "{}"), f"{self.file}: metadata")

    @property
    def metadata(self) -> dict[str, str]:
        return self._handle.metadata() or {}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        stored = self._slice(name).get_dtype()
        return _DTYPES.get(stored, stored)

    def read(self, name: str) -> Tensor:
        self._slice(name)
        try:
            tensor = self._handle.get_tensor(name)
        except (SafetensorError, AttributeError, TypeError) as error:  # a dtype that this torch does not know
            raise InputError(f"{self.file}: {name}: dtype {self.dtype(name)} cannot be read: {error}") from None
        return checked(tensor, self.file, name)

    def _slice(self, name: str) -> Any:
        try:
            return self._handle.get_slice(name)
        except SafetensorError:
            raise InputError(f"{self.file}: {name}: no such tensor") from None


class TorchFile:
    """A PyTorch file (`torch.save` of a dictionary of tensors, nested or not), of which nothing else is unpickled.

    Names of nested tensors are joined by dots, without the `WRAPPERS` on top. Tensors stay on disk until they are read
    (those of PyTorch before 1.6 are all read at once).
    """

    def __init__(self, file: Path):
        self.file = file

    @cached_property
    def names(self) -> list[str]:
        return sorted(self._tensors)

    @cached_property
    def metadata(self) -> dict[str, str]:
        plain = (str, int, float, bool)
        return {name: json.dumps(value) for name, value in self._values.items() if isinstance(value, plain)}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensor(name).shape)

    def dtype(self, name: str) -> str:
        return str(self._tensor(name).dtype).removeprefix("torch.")

    def read(self, name: str) -> Tensor:
        return checked(self._tensor(name).detach(), self.file, name)

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self._values.items() if isinstance(value, Tensor)}

    @cached_property
    def _values(self) -> dict[str, Any]:
        table = _load(self.file)
        if not isinstance(table, dict):
            raise InputError(f"{self.file}: holds a {type(table).__name__}: must be a dictionary of tensors")
        flat = _flat(table, self.file)
        check_names(flat, self.file)
        return flat

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise InputError(f"{self.file}: {name}: no such tensor")
        tensor = self._tensors[name]
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise InputError(f"{self.file}: {name}: is no plain tensor (sparse, quantized, or without data)")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():  # strides of 0
            raise InputError(f"{self.file}: {name}: claims more numbers {tuple(tensor.shape)} than the file holds")
        return tensor


class Shards:
    """Files that hold one dictionary of tensors together; `file` is named in messages."""

    def __init__(self, file: Path, parts: list[Tensors]):
        self.file = file
        self.metadata = parts[0].metadata
        self._parts: dict[str, Tensors] = {}
        for part in parts:
            if twice := [name for name in part.names if name in self._parts]:
                raise InputError(f"{part.file}: {twice[0]}: is in {self._parts[twice[0]].file} too")
            self._parts |= dict.fromkeys(part.names, part)

    @property
    def names(self) -> list[str]:
        return sorted(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._part(name).shape(name)

    def dtype(self, name: str) -> str:
        return self._part(name).dtype(name)

    def read(self, name: str) -> Tensor:
        return self._part(name).read(name)

    def _part(self, name: str) -> Tensors:
        if name not in self._parts:
            raise InputError(f"{self.file}: {name}: no such tensor")
        return self._parts[name]


def _load(file: Path) -> Any:
    check_regular(file)
    try:
        is_zip = zipfile.is_zipfile(file)
        if is_zip:
            _check_zip(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged or hostile pickle makes its reader stumble over
        raise InputError(f"{file}: {_why(error)}") from None


def _why(error: Exception) -> str:
    """In one line, and without torch's advice to load it unsafely."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text) or re.search(r"(?:function|class|type) (\S+\.\S+)", text):
        return f"holds Python objects ({clip(found[1])}) beside tensors, and these are never loaded"
    lines = [line for line in text.splitlines() if line.strip() and "weights_only" not in line]
    return f"not a whole PyTorch file of tensors: {clip(lines[0]) if lines else type(error).__name__}"


def _check_zip(file: Path) -> None:
    """InputError where a zip's members would unfold to more than the file: torch.save stores, it never compresses."""
    size = file.stat().st_size
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise InputError(f"{file}: {clip(member.filename)}: is compressed, which torch.save never does")
    if (claimed := sum(member.file_size for member in members)) > size:
        raise InputError(f"{file}: claims to hold {claimed} bytes, and has {size}")


def _flat(table: dict[Any, Any], file: Path) -> dict[str, Any]:
    """Nested dictionaries as one, names joined by dots; only the first of the `WRAPPERS` where there is one."""
    seen: set[int] = set()
    while not any(isinstance(value, Tensor) for value in table.values()):
        inner = next((table[key] for key in WRAPPERS if isinstance(table.get(key), dict)), None)
        if inner is None or id(inner) in seen:
            break
        seen.add(id(inner))
        others = {key: value for key, value in table.items() if value is not inner and not isinstance(value, Tensor)}
        table = {**inner, **{key: value for key, value in others.items() if key not in inner and _is_plain(value)}}
    flat: dict[str, Any] = {}
    _flatten(table, "", flat, file)
    return flat


def check_names(names: Iterable[str], file: Path) -> None:
    """InputError for a name that no message could show in its line."""
    for name in names:
        if len(name) > MAX_NAME or not name.isprintable():
            raise InputError(f"{file}: holds a tensor whose name is no name: {show(name)}")


def _is_plain(value: Any) -> bool:
    """A setting, or a table of settings: no optimizer state."""
    if isinstance(value, dict):
        return all(isinstance(item, (str, int, float, bool)) for item in value.values())
    return isinstance(value, (str, int, float, bool))


def _flatten(table: dict[Any, Any], prefix: str, flat: dict[str, Any], file: Path) -> None:
    if prefix.count(".") > 64:
        raise InputError(f"{file}: dictionaries are nested too deep")
    for key, value in table.items():
        if isinstance(value, dict):
            _flatten(value, f"{prefix}{key}.", flat, file)
        else:
            flat[f"{prefix}{key}"] = value


def checked(tensor: Tensor, file: Path, name: str) -> Tensor:
    if not tensor.dtype.is_floating_point:
        if tensor.numel() != 1 or tensor.dtype.is_complex:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{file}: {name}: dtype {kind}: must be floating-point numbers (quantized?)")
        tensor = tensor.float()
    if tensor.dtype.itemsize == 1:  # torch computes nothing in 8 bits
        tensor = tensor.float()
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():  # NaN goes through both; one pass
        raise InputError(f"{file}: {name}: holds NaN or Inf")
    return tensor


def read_json(file: Path, *, limit_bytes: int = CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file; InputError where it is none, or larger than such a file ever is."""
    check_regular(file)
    if (size := file.stat().st_size) > limit_bytes:
        raise InputError(f"{file}: has {size} bytes: too large for a JSON file of this kind")
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None
    return parse_object(text, str(file))


def parse_object(text: str, where: str) -> dict[str, Any]:
    """The JSON object in a text; InputError where it is none."""
    return parse(text, where)


def check_regular(file: Path) -> None:
    """InputError where there is no file, or something that is none: a pipe would be waited for without end."""
    if not file.is_file():
        raise InputError(f"{file}: no such file" if not file.exists() else f"{file}: is not a regular file")


@contextlib.contextmanager
def disk_errors(file: Path) -> Iterator[None]:
    """What safetensors raises for a full disk becomes the OSError that it is."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        if not (found := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(file)) from None
