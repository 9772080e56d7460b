"""For notebooks: `lorabench.load(path)` gives the weight updates of an adapter by layer. Importing it is quick."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from lorabench.linalg.decompose import ThinSVD
    from lorabench.updates.formats import Adapter
    from lorabench.updates.layer import LayerSVD

Value = TypeVar("Value")


def load(path: str | Path, *, base: str | Path | None = None, alpha: float | None = None) -> Updates:
    """The weight updates of an adapter: a file, a folder or a Hub id, of any known format.

        updates = lorabench.load("my-adapter")
        updates["model.layers.0.self_attn.q_proj"].S

    Parts of fused layers, as the run or `base` tells them, stand beside these (`….qkv_proj[q]`).
    `base`: the untouched weights, where ΔW is the difference of two checkpoints, or needs W0 (DoRA). `alpha`: the α
    of formats that do not keep theirs. Raises `lorabench.config.decode.InputError` where nothing there can be read, or
    where it is a run's and not what it was when the run ended.
    """
    from lorabench.adapters.examine.fused_layers import fused_layers, with_parts
    from lorabench.store.store import check_run
    from lorabench.updates.formats import open_adapter

    check_run(path)
    adapter = open_adapter(path, base=base, alpha=alpha)
    return Updates(with_parts(adapter, fused_layers(adapter, base)))


class _ByLayer(Mapping[str, Value]):
    """Values made when asked for, by layer."""

    def __init__(self, names: Mapping[str, str], get: Callable[[str], Value]):
        self._names, self._get = names, get

    def __getitem__(self, layer: str) -> Value:
        return self._get(layer)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, layer: object) -> bool:  # Mapping's own would read it
        return layer in self._names


class Updates(_ByLayer["ThinSVD"]):
    """Layer name -> thin SVD of its ΔW, read and decomposed when asked for; the last one is kept.

    `source`, `format`, `scale_source` and `notes` are what the reader says of the adapter (`formats.Adapter`);
    `layers` gives each layer as a `LayerSVD`: rank, scale, ‖W0‖, ΔW itself.
    """

    def __init__(self, adapter: Adapter):
        super().__init__({name.removesuffix(".weight"): name for name in adapter.entries}, self._svd)
        self._adapter = adapter
        self._last: LayerSVD | None = None
        self.source, self.format = adapter.source, adapter.format
        self.scale_source, self.notes = adapter.scale_source, adapter.notes

    @property
    def layers(self) -> Mapping[str, LayerSVD]:
        return _ByLayer(self._names, self.layer)

    def layer(self, name: str) -> LayerSVD:
        """One layer. KeyError with the closest name if there is none; InputError where its file is damaged."""
        from lorabench.updates.formats import load_layer

        if name not in self:
            close = difflib.get_close_matches(name, self, n=1)
            raise KeyError(f"no layer '{name}'" + (f"; did you mean '{close[0]}'?" if close else ""))
        if self._last is None or self._last.layer != name:
            self._last = load_layer(self._adapter.entries[self._names[name]])
        return self._last

    def _svd(self, name: str) -> ThinSVD:
        return self.layer(name).svd

    def __repr__(self) -> str:
        scale = f", scale from {self.scale_source}" if self.scale_source else ""
        first = f": {next(iter(self))}, …" if len(self) > 1 else f": {next(iter(self))}" if self else ""
        return f"<lorabench updates of {self.source} ({self.format}{scale}), {len(self)} layers{first}>"
