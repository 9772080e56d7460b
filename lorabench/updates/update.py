"""One layer's learned weight change, ΔW = B A, and the file it is kept in.

Shapes: M out features, N in features, r rank, K kept singular vectors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lorabench.updates.parts import Part

DELTA_FILE = "delta.safetensors"
SVD_FILE = "svd.safetensors"
INITIAL_FILE = "initial_factors.safetensors"
"""Beside a LoRA adapter whose factors did not begin at B A = 0: `LAYER.B` and `LAYER.A` before training."""
DRAWN_FILE = "drawn.safetensors"
"""Beside what a run has learned: what the base's files lack (a new head, a pooler), as the run drew it."""
DORA_PART = "sBA"
"""`Update.part` of the factors of DoRA's ΔW, which are reported beside it as `MODULE[sBA]`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Update:
    """ΔW of one parameter, in mathematical orientation (out, in): the layer computes x (W0 + ΔW)ᵀ.

    `B` (M, r) and `A` (r, N), with the method's scale folded into `B`; `A = None` means that `B` (M, N) is ΔW itself.
    An embedding counts as a layer whose input is a one-hot token: ΔW is (width, vocabulary), as PEFT's factors have it.
    A vector (bias, norm) is dense with shape (M, 1). `parameter` is its full name in the untouched base model;
    `base_norm` is ‖W0‖_F where known; `precision` names the dtype that a dense ΔW was stored in.
    `scale` is the s folded into `B`; None where unknown, or there is none (a difference of weights).
    `part` names a share of ΔW that is reported beside the whole (DoRA's `sBA`); None for ΔW itself.
    `scale_source` says where the scale came from: `config`, `file`, `assumed` or `--alpha`; None for a dense ΔW.
    `kernel` is the (height, width) over which the columns of a convolution's ΔW, (in, height, width), are flattened.
    `fused` says which rows of a fused weight it is of (`MODULE[q].weight`); None for a whole weight.
    """

    parameter: str
    B: Tensor
    A: Tensor | None = None
    base_norm: float | None = None
    precision: str | None = None
    scale: float | None = None
    scale_source: str | None = None
    part: str | None = None
    kernel: tuple[int, ...] = ()
    fused: Part | None = None

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


def save_updates(updates: Iterable[Update], folder: Path) -> None:
    """Write each ΔW to `delta.safetensors`, in (out, in) orientation: `NAME`, or its factors `NAME:B` and `NAME:A`."""
    from safetensors.torch import save_file

    tensors, norms = {}, {}
    for update in updates:
        if update.A is None:
            tensors[update.parameter] = update.B.contiguous()
        else:
            tensors |= {f"{update.parameter}:B": update.B.contiguous(), f"{update.parameter}:A": update.A.contiguous()}
        norms[update.parameter] = update.base_norm
    about = {"format": "lorabench-delta", "orientation": "out,in", "base_norms": norms}
    save_file(tensors, folder / DELTA_FILE, metadata=_metadata(about))


def stream_updates(updates: Iterable[Update], folder: Path) -> None:
    """The file of `save_updates`, byte for byte, while one update at a time is held in memory."""
    entries: dict[str, dict[str, Any]] = {}
    norms, spool = {}, folder / f"{DELTA_FILE}.spool"
    with open(spool, "wb") as file:
        for update in updates:
            parts = {"": update.B} if update.A is None else {":B": update.B, ":A": update.A}
            for suffix, tensor in parts.items():
                entries[update.parameter + suffix] = _spooled(tensor, file)
            norms[update.parameter] = update.base_norm
    about = {"format": "lorabench-delta", "orientation": "out,in", "base_norms": norms}
    _assemble(entries, _metadata(about), spool, folder / DELTA_FILE)
    spool.unlink()


_DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Of safetensors, in the order in which its files have the tensors."""


def _spooled(tensor: Tensor, file: Any) -> dict[str, Any]:
    import torch

    dtype, begin = _DTYPES[str(tensor.dtype).removeprefix("torch.")], file.tell()
    file.write(tensor.contiguous().view(torch.uint8).numpy())
    return {"dtype": dtype, "shape": [*tensor.shape], "begin": begin, "bytes": tensor.nbytes}


def _assemble(entries: dict[str, dict[str, Any]], metadata: dict[str, str], spool: Path, file: Path) -> None:
    """A safetensors file of what was spooled, in the order in which that library writes it."""
    header: dict[str, Any] = {"__metadata__": metadata}
    order = [*_DTYPES.values()]
    names = sorted(entries, key=lambda name: (order.index(entries[name]["dtype"]), name))
    end = 0
    for name in names:
        begin, end = end, end + entries[name]["bytes"]
        header[name] = {key: entries[name][key] for key in ("dtype", "shape")} | {"data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(spool, "rb") as source, open(file, "wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            source.seek(entries[name]["begin"])
            left = entries[name]["bytes"]
            while left:
                left -= target.write(source.read(min(left, 2**24)))


def read_deltas(folder: Path) -> Iterator[Update]:
    """What `save_updates` wrote, one at a time."""
    from safetensors import safe_open

    with safe_open(folder / DELTA_FILE, framework="pt") as handle:
        keys = set(handle.keys())
        for name in sorted({key.removesuffix(":A").removesuffix(":B") for key in keys}):
            if f"{name}:B" in keys:
                yield Update(parameter=name, B=handle.get_tensor(f"{name}:B"), A=handle.get_tensor(f"{name}:A"))
            else:
                yield Update(parameter=name, B=handle.get_tensor(name))


def save_drawn(drawn: dict[str, Tensor], folder: Path) -> None:
    """What the base's files lack, as it was drawn: ΔW counts from there."""
    from safetensors.torch import save_file

    if drawn:
        save_file({name: tensor.contiguous() for name, tensor in drawn.items()}, folder / DRAWN_FILE)


def restore_drawn(base: nn.Module, folder: Path) -> None:
    """Put what `save_drawn` wrote in place of what the base was loaded with; where there is any."""
    import torch
    from safetensors.torch import load_file

    if (folder / DRAWN_FILE).exists():
        with torch.no_grad():
            for name, tensor in load_file(folder / DRAWN_FILE).items():
                base.get_parameter(name).copy_(tensor)


def save_svds(updates: Iterable[Update], folder: Path, keep: int) -> None:
    """Write every singular value and the top `keep` singular vectors of each ΔW to `svd.safetensors`."""
    from safetensors.torch import save_file

    from lorabench.linalg.decompose import thin_svd

    tensors: dict[str, Tensor] = {}
    norms, ranks = {}, {}
    for update in updates:
        svd = thin_svd(update.B, update.A, keep=keep)
        parts = {"U": svd.U, "S": svd.S, "Vh": svd.Vh}
        tensors |= {f"{update.parameter}:{part}": tensor.contiguous() for part, tensor in parts.items()}
        norms[update.parameter] = update.base_norm
        ranks[update.parameter] = None if update.A is None else update.B.shape[1]
    about = {"format": "lorabench-svd", "keep": keep, "base_norms": norms, "ranks": ranks}
    save_file(tensors, folder / SVD_FILE, metadata=_metadata(about))


def _metadata(about: dict[str, Any]) -> dict[str, str]:
    """One key: safetensors writes several in an order of its own, and equal updates should be equal files."""
    return {"lorabench": json.dumps(about)}
