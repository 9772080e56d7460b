"""torchtune: `adapter_model.pt` (older: `adapter_N.pt`), and `adapter_config.json` where its checkpointer writes one.

ΔW = s B A with `lora_b.weight` (out, r), `lora_a.weight` (r, in), s = `lora_alpha` / `r`. Rows of q_proj and k_proj
stand in the order of torchtune's rotary embedding, another than Hugging Face's: singular values and right singular
vectors are the same, left ones are not. DoRA (`.magnitude`): ΔW needs W0
by torchtune's names; without, what is read is its part s B A. Where the same
adapter lies beside it in PEFT's format, a folder is read as that. Source: `torchtune/modules/peft`,
`torchtune/training/checkpointing`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lorabench.updates.readers._dora import Dora
from lorabench.updates.readers._entry import CONFIG_FILE, Found, Source, Tensors
from lorabench.updates.readers._factors import (
    Layer,
    Scale,
    adapter_file,
    as_dora,
    by_convention,
    configuration,
    found,
    rank_of,
    stems,
)
from lorabench.updates.readers._peft_config import ADAPTER_FILES, scale_of_factors

ADAPTER_FILE = r"adapter_(model|\d+)\.pt"
A_LEAF, B_LEAF, MAGNITUDE = ".lora_a.weight", ".lora_b.weight", ".magnitude"
ASSUMED = "no configuration beside it: α = r is assumed, so that the scale is 1 (--alpha tells another)"
ROTARY = "rows of q and k are in torchtune's rotary order: their left singular vectors are not those of other formats"


def find(source: Source) -> Found | None:
    """The adapter of a folder or file; None where there is none."""
    if source.path.is_dir() and any((source.path / name).exists() for name in ADAPTER_FILES):
        return None
    tensors = adapter_file(source, lambda tensors: bool(stems(tensors, A_LEAF)), named=ADAPTER_FILE)
    if tensors is None:
        return None
    modules, names = stems(tensors, A_LEAF), set(tensors.names)
    dora = {module for module in modules if module + MAGNITUDE in names}
    config = configuration(source, ADAPTER_FILE)
    scale = partial(_scale, config, source)
    layers: list[Layer | Dora] = []
    for module in modules:
        layer = _layer(tensors, module, scale)
        layers += as_dora(layer, source, module + MAGNITUDE) if module in dora else [layer]
    used = {module + leaf for module in modules for leaf in (A_LEAF, B_LEAF, MAGNITUDE)}
    notes = [ROTARY] if any(module.endswith(("q_proj", "k_proj")) for module in modules) else []
    return found("torchtune", layers, assumed=ASSUMED, notes=notes, left_out=names - used, config=config)


def _layer(tensors: Tensors, module: str, scale_of: Callable[[str, int], Scale]) -> Layer:
    return Layer(
        tensors=tensors,
        parameter=f"{module}.weight",
        names={"B": module + B_LEAF, "A": module + A_LEAF},
        scale=scale_of(module, rank_of(tensors, module + A_LEAF)),
    )


def _scale(config: dict[str, Any], source: Source, module: str, rank: int) -> Scale:
    if not config:
        return by_convention(source, rank)
    return Scale(value=scale_of_factors(config, module, rank, source.folder / CONFIG_FILE), source="config")
