"""An adapter's fused layers as their parts, q, k and v of `qkv_proj`: as its run has told, or the base's configuration.

Of stacked experts and of names that are not transformers' (kohya's, llama.cpp's) only a run tells.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from lorabench.models.fused import LAYOUTS, Parts, parts_by_config
from lorabench.updates.formats import Adapter
from lorabench.updates.locate import adapter_path, weights_path
from lorabench.updates.parts import part_entries, read_parts
from lorabench.updates.readers._entry import Entry
from lorabench.updates.tensorfile import read_json
from lorabench.updates.update import DORA_PART

Fused = dict[str, Parts]


def fused_layers(adapter: Adapter, base: str | Path | None) -> Fused:
    """The parts of its fused matrices, by parameter; none where neither a run nor a base's `config.json` tells any."""
    if os.path.isdir(adapter.source):
        folder = adapter_path(adapter.source)
        if (folder.parent / "spec.json").is_file() and (told := read_parts(folder)):  # a run's
            return told
    leaves = {leaf for layouts in LAYOUTS.values() for leaf in layouts}
    named = [name for name in adapter.entries if name.removesuffix(".weight").rpartition(".")[2] in leaves]
    if base is None or not named:
        return {}
    weights = weights_path(base)
    file = (weights if weights.is_dir() else weights.parent) / "config.json"
    shapes = {name: adapter.entries[name].shape for name in named}
    return parts_by_config(read_json(file), shapes, str(file)) if file.is_file() else {}


def with_parts(adapter: Adapter, fused: Fused) -> Adapter:
    """Parts stand behind their matrix."""
    entries: dict[str, Entry] = {}
    for name, entry in adapter.entries.items():
        entries |= {name: entry} | ({} if f"[{DORA_PART}]" in name else part_entries(name, entry, fused))
    return dataclasses.replace(adapter, entries=entries)


def in_parts(a: Adapter, b: Adapter, base: str | Path | None) -> tuple[Adapter, Adapter]:
    """Both with parts in place of the matrices that both have by one name, as one of them tells."""
    fused = fused_layers(a, base) | fused_layers(b, base)
    shared = {name: parts for name, parts in fused.items() if name in a.entries and name in b.entries}
    return _replaced(a, shared), _replaced(b, shared)


def _replaced(adapter: Adapter, fused: Fused) -> Adapter:
    entries: dict[str, Entry] = {}
    for name, entry in adapter.entries.items():
        entries |= part_entries(name, entry, fused) or {name: entry}
    return dataclasses.replace(adapter, entries=entries)
