"""lorabench's kept singular vectors: `svd.safetensors`, every singular value and the top K vectors of each ΔW."""

from __future__ import annotations

from dataclasses import dataclass

from lorabench.config.decode import InputError
from lorabench.linalg.decompose import ThinSVD
from lorabench.updates.layer import LayerSVD
from lorabench.updates.readers._entry import Entry, Found, Source, TensorFile, numbers
from lorabench.updates.update import SVD_FILE


@dataclass(frozen=True, eq=False)
class KeptSVD:
    tensors: TensorFile
    name: str
    base_norm: float | None
    rank: int | None

    @property
    def shape(self) -> tuple[int, int]:
        U, S, Vh = (self.tensors.shape(f"{self.name}:{part}") for part in ("U", "S", "Vh"))
        if not (len(U) == len(Vh) == 2 and len(S) == 1 and U[1] == Vh[0] <= S[0] <= min(U[0], Vh[1])):
            raise InputError(f"{self.tensors.file}: {self.name}: U {U}, S {S} and Vh {Vh} do not fit")
        return U[0], Vh[1]

    def load(self) -> LayerSVD:
        U, S, Vh = (self.tensors.read(f"{self.name}:{part}") for part in ("U", "S", "Vh"))
        return LayerSVD(
            parameter=self.name,
            svd=ThinSVD(U=U, S=S.double(), Vh=Vh),
            rank=self.rank,
            base_norm=self.base_norm,
            precision=None if self.rank else str(U.dtype).removeprefix("torch."),
        )


def find(source: Source) -> Found | None:
    """What lorabench kept there; None where there is no such file."""
    folder = source.folder
    if not (folder / SVD_FILE).exists():
        return None
    tensors = TensorFile(folder / SVD_FILE)
    if tensors.about.get("format") != "lorabench-svd":
        return None
    norms, ranks = (numbers(tensors.about.get(key), f"{tensors.file}: {key}") for key in ("base_norms", "ranks"))
    parameters = sorted({name.rpartition(":")[0] for name in tensors.names})
    entries: dict[str, Entry] = {name: KeptSVD(tensors, name, norms.get(name), ranks.get(name)) for name in parameters}
    return Found(format="lorabench", entries=entries)
