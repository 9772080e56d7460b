"""lorabench's own ΔW: `delta.safetensors`, dense or as two factors a parameter (see `lorabench.updates.update`)."""

from __future__ import annotations

from dataclasses import dataclass

from lorabench.config.decode import InputError
from lorabench.updates.readers._entry import Entry, Found, Source, TensorFile, numbers
from lorabench.updates.update import DELTA_FILE, Update


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


@dataclass(frozen=True, eq=False)
class Factored:
    tensors: TensorFile
    name: str
    base_norm: float | None

    @property
    def shape(self) -> tuple[int, int]:
        B, A = self.tensors.shape(f"{self.name}:B"), self.tensors.shape(f"{self.name}:A")
        if not (len(B) == len(A) == 2 and B[1] == A[0]):
            raise InputError(f"{self.tensors.file}: {self.name}: B {B} and A {A} do not fit each other")
        return B[0], A[1]

    def load(self) -> Update:
        B, A = self.tensors.read(f"{self.name}:B"), self.tensors.read(f"{self.name}:A")
        return Update(parameter=self.name, B=B, A=A, base_norm=self.base_norm, scale_source="file")


def find(source: Source) -> Found | None:
    """What lorabench kept there; None where there is no such file."""
    folder = source.folder
    if not (folder / DELTA_FILE).exists():
        return None
    tensors = TensorFile(folder / DELTA_FILE)
    if tensors.about.get("format") != "lorabench-delta":
        return None
    norms = numbers(tensors.about.get("base_norms"), f"{tensors.file}: base_norms")
    entries: dict[str, Entry] = {}
    for key in tensors.names:
        name, _, factor = key.partition(":")
        entries[name] = (Factored if factor else Delta)(tensors, name, norms.get(name))
    return Found(format="lorabench", entries=entries, scale_source=None)
