"""One layer's learned weight change, ΔW = B A, and the file it is kept in.

Shapes: M out features, N in features, r rank, K kept singular vectors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

DELTA_FILE = "delta.safetensors"
SVD_FILE = "svd.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class Update:
    """ΔW of one parameter, in mathematical orientation (out, in): the layer computes x (W0 + ΔW)ᵀ.

    `B` (M, r) and `A` (r, N), with the method's scale folded into `B`; `A = None` means that `B` (M, N) is ΔW itself.
    A vector (bias, norm) is dense with shape (M, 1). `parameter` is its full name in the untouched base model;
    `base_norm` is ‖W0‖_F where known; `precision` names the dtype that a dense ΔW was stored in.
    `scale_source` says where the scale came from: `config`, `file`, `assumed` or `--alpha`; None for a dense ΔW.
    """

    parameter: str
    B: Tensor
    A: Tensor | None = None
    base_norm: float | None = None
    precision: str | None = None
    scale_source: str | None = None

    @property
    def layer(self) -> str:
        """Name of the module: the parameter's without `.weight`."""
        return self.parameter.removesuffix(".weight")

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], (self.B if self.A is None else self.A).shape[1]

    def dense(self) -> Tensor:
        """ΔW (M, N). Forms the product: for tests and for merging, never for analysis."""
        return self.B if self.A is None else self.B @ self.A


def save_deltas(updates: Iterable[Update], folder: Path) -> None:
    """Write dense ΔW, one tensor a parameter in (out, in) orientation, to `delta.safetensors`."""
    from safetensors.torch import save_file

    tensors, norms = {}, {}
    for update in updates:
        tensors[update.parameter] = update.dense().contiguous()
        norms[update.parameter] = update.base_norm
    metadata = {"format": "lorabench-delta", "orientation": "out,in", "base_norms": json.dumps(norms)}
    save_file(tensors, folder / DELTA_FILE, metadata=metadata)


def save_svds(updates: Iterable[Update], folder: Path, keep: int) -> None:
    """Write every singular value and the top `keep` singular vectors of each ΔW to `svd.safetensors`."""
    from safetensors.torch import save_file

    from lorabench.linalg import thin_svd

    tensors, norms, ranks = {}, {}, {}
    for update in updates:
        svd = thin_svd(update.B, update.A, keep=keep)
        parts = {"U": svd.U, "S": svd.S, "Vh": svd.Vh}
        tensors |= {f"{update.parameter}:{part}": tensor.contiguous() for part, tensor in parts.items()}
        norms[update.parameter] = update.base_norm
        ranks[update.parameter] = None if update.A is None else update.B.shape[1]
    tables = {"base_norms": json.dumps(norms), "ranks": json.dumps(ranks)}
    save_file(tensors, folder / SVD_FILE, metadata={"format": "lorabench-svd", "keep": str(keep)} | tables)


def read_deltas(file: Path) -> Iterator[Update]:
    """The updates of a `delta.safetensors`, one at a time (memory: one layer)."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        norms = json.loads(tensors.metadata()["base_norms"])
        for name in sorted(tensors.keys()):
            delta = tensors.get_tensor(name)
            precision = str(delta.dtype).removeprefix("torch.")
            yield Update(parameter=name, B=delta, base_norm=norms[name], precision=precision)
