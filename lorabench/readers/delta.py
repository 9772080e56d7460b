"""lorabench's dense ΔW: `delta.safetensors`, one tensor a parameter (see `lorabench.update`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorabench.decode import InputError
from lorabench.readers._entry import Entry, TensorFile
from lorabench.update import DELTA_FILE, Update


@dataclass(frozen=True, eq=False)
class Delta:
    tensors: TensorFile
    name: str
    base_norm: float | None

    @property
    def shape(self) -> tuple[int, int]:
        shape = self.tensors.shape(self.name)
        if len(shape) != 2:
            raise InputError(f"{self.tensors.file}: {self.name}: shape {shape} is not a matrix")
        return shape

    def load(self) -> Update:
        delta = self.tensors.read(self.name)
        precision = str(delta.dtype).removeprefix("torch.")
        return Update(parameter=self.name, B=delta, base_norm=self.base_norm, precision=precision)


def find(folder: Path) -> dict[str, Entry]:
    """The entries of `folder` by parameter; empty where it holds no such file."""
    if not (folder / DELTA_FILE).exists():
        return {}
    tensors = TensorFile(folder / DELTA_FILE)
    if tensors.about.get("format") != "lorabench-delta":
        return {}
    norms = tensors.about["base_norms"]
    return {name: Delta(tensors, name, norms.get(name)) for name in tensors.names}
