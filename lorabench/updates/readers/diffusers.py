"""diffusers: one file of `unet.`, `transformer.` or `text_encoder.` modules, and no configuration beside it.

Suffixes `.lora_A.weight` / `.lora_B.weight`, and the older `.lora.down` / `.up`, `.lora_linear_layer.down` / `.up` and
`.processor.to_q_lora.down` / `.up`; older names are told as today's (`.to_q`, `.to_out.0`, a text encoder's `.q_proj`).
ΔW = s B A. s is told, in this order, by the header's `lora_adapter_metadata` (the PEFT configuration of each
component), a module's `.alpha`, or `--alpha`; else α = r, diffusers' own convention in loading, so that s = 1.
Source: `loaders/lora_base.py`, `utils/state_dict_utils.py`. Fused linears are split (`_fused`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lorabench.updates.readers._dora import Dora
from lorabench.updates.readers._entry import Found, Source, Tensors
from lorabench.updates.readers._factors import (
    Layer,
    Scale,
    adapter_file,
    as_dora,
    by_convention,
    found,
    number,
    rank_of,
)
from lorabench.updates.readers._fused import split_rows
from lorabench.updates.readers._peft_config import scale_of_factors
from lorabench.updates.tensorfile import parse_object

METADATA = "lora_adapter_metadata"
SUFFIXES = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora.down.weight": ".lora.up.weight",
    ".lora_linear_layer.down.weight": ".lora_linear_layer.up.weight",
    "_lora.down.weight": "_lora.up.weight",
}
"""Of A and of B."""
MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".dora_scale")
ASSUMED = "no alpha in the file: α = r is assumed, so that the scale is 1 (--alpha tells another)"

_OF_XLABS = re.compile(r"_blocks\.\d+\.processor\.(?:qkv|proj)_lora\d?\.")
_OLD_NAMES = {"to_out": "to_out.0"}
_OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def find(source: Source) -> Found | None:
    """The adapter of one file with such names; None where there is none."""
    tensors = adapter_file(source, lambda tensors: any(True for _ in _modules(tensors)))
    if tensors is None:
        return None
    file = _File(tensors, source)
    modules = list(_modules(tensors))
    layers = [layer for stem, A, B in modules for layer in file.layers(stem, A, B)]
    companions = (".alpha", *MAGNITUDES)
    used = {name for stem, A, B in modules for name in (A, B, *(stem + suffix for suffix in companions))}
    return found("diffusers", layers, assumed=ASSUMED, left_out=set(tensors.names) - used, config=file.config)


def _modules(tensors: Tensors) -> Iterator[tuple[str, str, str]]:
    """A module's name without suffix, and those of its A and B."""
    for name in tensors.names:
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
        if suffix and not name.startswith("base_model.model.") and not _OF_XLABS.search(name):  # PEFT's own file
            stem = name.removesuffix(suffix)
            yield stem, name, stem + SUFFIXES[suffix]


@dataclass(frozen=True, eq=False)
class _File:
    tensors: Tensors
    source: Source

    def layers(self, stem: str, A: str, B: str) -> Iterator[Layer | Dora]:
        module = _todays_name(stem, A)
        layer = Layer(
            tensors=self.tensors,
            parameter=f"{module}.weight",
            names={"B": B, "A": A},
            scale=self._scale(stem, module, rank_of(self.tensors, A)),
            kernel=self.tensors.shape(A)[2:],
        )
        magnitude = next((stem + suffix for suffix in MAGNITUDES if stem + suffix in self._names), None)
        for part in split_rows(layer, module, self.source.weights):
            yield from as_dora(part, self.source, magnitude) if magnitude else [part]

    def _scale(self, stem: str, module: str, rank: int) -> Scale:
        component, _, path = module.partition(".")
        for prefix, name in ((component, path), ("", module)):
            if config := self._configs.get(prefix):
                where = f"{self.tensors.file}: {METADATA}"
                return Scale(value=scale_of_factors(config, name, rank, where), source="file")
        alpha = number(self.tensors, f"{stem}.alpha") if f"{stem}.alpha" in self._names else 0.0
        return Scale(value=alpha / rank, source="file") if alpha else by_convention(self.source, rank)

    @property
    def config(self) -> dict[str, Any]:
        """PEFT's configuration in the header, of a file of one component; of several there is none for all."""
        (config, *more) = self._configs.values() or [{}]
        return {} if more else config

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.tensors.names)

    @cached_property
    def _configs(self) -> dict[str, dict[str, Any]]:
        """The header's configurations by component; "" is that of a file of one component, without prefixes."""
        table = parse_object(self.tensors.metadata.get(METADATA) or "{}", f"{self.tensors.file}: {METADATA}")
        configs: dict[str, dict[str, Any]] = {}
        for key, value in table.items():
            component, _, field = key.rpartition(".")
            configs.setdefault(component, {})[field] = value
        return configs


def _todays_name(stem: str, A: str) -> str:
    module = stem.replace(".processor.", ".")
    if not A.endswith("_lora.down.weight"):
        return module
    parent, _, leaf = module.rpartition(".")
    names = _OLD_TEXT_NAMES if module.startswith("text_encoder") else _OLD_NAMES
    return f"{parent}.{names.get(leaf, leaf)}"
