"""How far training has moved a method's factors from where they began, of each linear layer that has them.

    moved_A     ‖A − A₀‖, Frobenius              moved_B     ‖B − B₀‖: of a B that begins at zero ‖B‖
    relative_A  ‖A − A₀‖ / ‖A₀‖                  relative_B  the same, where B₀ is not zero
    cosine_A    ⟨A, A₀⟩ / (‖A‖ ‖A₀‖)             cosine_B    the same

Zhu et al. 2024 (arXiv 2402.16842) find that what A learns hardly matters beside what B does. The start is kept on disk
beside the checkpoint until the run is done: exact whatever made it, data too, and it takes no memory meanwhile.
"""

from __future__ import annotations

import os
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from lorabench.config.durable import make_folder, remove
from lorabench.training.state import Training

FILE = "start.safetensors"
Movements = dict[str, dict[str, float]]
"""Layer -> what is above, and `relative_A_null`, `cosine_A_null_std` … of factors that have forgotten their start."""


def keep(training: Training, folder: Path) -> None:
    """Write the factors as they are. Of those that are zero there is nothing to write."""
    if not _has_start(training):
        return
    factors = training.spec.method.factors(training.model)
    begun = {f"{side}:{name}": getattr(factor, side).detach() for name, factor in factors.items() for side in "AB"}
    if not folder.is_dir():
        remove(folder)
    make_folder(folder)
    temporary = folder / f"{FILE}.{os.getpid()}.tmp"
    safetensors.torch.save_file({key: value.contiguous() for key, value in begun.items() if value.any()}, temporary)
    os.replace(temporary, folder / FILE)


def measure(training: Training, folder: Path) -> Movements:
    """Of each layer; empty where the method has no factors, or begins anew on its way (ReLoRA). OSError, or
    safetensors' own error, where the start cannot be read."""
    if not _has_start(training):
        return {}
    found: Movements = {}
    with safetensors.safe_open(folder / FILE, framework="pt") as begun:
        known = set(begun.keys())
        for name, factor in training.spec.method.factors(training.model).items():
            found[name] = {}
            for side in "AB":
                start = begun.get_tensor(key) if (key := f"{side}:{name}") in known else None
                own = _movement(getattr(factor, side).detach().cpu(), start)
                found[name] |= {key.replace("*", side): value for key, value in own.items()}
    return found


def _has_start(training: Training) -> bool:
    method = training.spec.method
    return method.is_factors and not method.merges_as_it_goes and not training.base.world.is_sharded


def _movement(end: Tensor, start: Tensor | None) -> dict[str, float]:
    """Of one factor, `*` for its side.

    Independent of its start, of the length that it has, a factor would be √(1 + ‖A‖² / ‖A₀‖²) away from it (in mean
    square), and its cosine 0 ± 1 / √(number of entries).
    """
    end = end.double()
    if start is None:
        return {"moved_*": float(end.norm())}
    start = start.double()
    moved, size, length = (float(torch.linalg.vector_norm(each)) for each in (end - start, start, end))
    found = {"moved_*": moved, "relative_*": moved / size, "relative_*_null": (1 + (length / size) ** 2) ** 0.5}
    if length:
        cosine = float((end * start).sum()) / (size * length)
        found |= {"cosine_*": max(-1.0, min(1.0, cosine)), "cosine_*_null_std": end.numel() ** -0.5}
    return found
