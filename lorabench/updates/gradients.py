"""The top singular triplets of the loss's gradient at W0, layer by layer: kept once for all runs of a base and data.

RESULTS/gradients/<name>.safetensors     `SET:LAYER:U` (M, K), `:S` (K,), `:Vh` (K, N); SET is `task` or `retain`
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lorabench.config.durable import make_folder
from lorabench.linalg.decompose import ThinSVD

FOLDER, SUFFIX = "gradients", ".safetensors"
TASK, RETAIN = "task", "retain"
PARTS = ("U", "S", "Vh")
Gradients = Mapping[str, ThinSVD]
"""Of one layer, by set."""


def write_gradients(found: Mapping[str, Gradients], file: Path) -> None:
    """Whole or not at all. `found`: set -> layer -> triplets."""
    from safetensors.torch import save_file

    tensors = {f"{name}:{layer}:{part}": getattr(svd, part).contiguous()
               for name, layers in found.items() for layer, svd in layers.items() for part in PARTS}  # fmt: skip
    make_folder(file.parent)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, temporary)
    os.replace(temporary, file)


def read_gradients(file: Path, layer: str) -> Gradients:
    """Empty where there is no file, or no such layer in it."""
    from safetensors import safe_open

    if not file.is_file():
        return {}
    with safe_open(file, framework="pt") as handle:
        names = {key.partition(":")[0] for key in handle.keys() if key.split(":")[1] == layer}  # noqa: SIM118
        return {
            name: ThinSVD(**{part: handle.get_tensor(f"{name}:{layer}:{part}") for part in PARTS})
            for name in sorted(names)
        }
