"""Updates from files: what lorabench writes, and adapters of others. Nothing is unpickled, no model is built.

Add a format by adding one file to `lorabench/readers/` with `find(source)`: what it has found there, None where the
content is not of its format. A folder may hold several (an adapter, and the dense ΔW of a task head).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lorabench import plugins
from lorabench.decode import InputError
from lorabench.layer import LayerSVD
from lorabench.linalg import ThinSVD, one_thread, thin_svd
from lorabench.readers._entry import Entry, Found, Source
from lorabench.update import Update

VERSION = 1
"""Part of every analysis's cache key: raise it when the same file reads as other numbers."""
DENSE_VECTORS = 64
"""Singular vectors kept of a dense ΔW; of a factored one all r are."""
_LARGE = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """A file or folder that holds what a fine-tuning changed: every ΔW by parameter, not read yet.

    `scale_source` says where the scale s of ΔW = s B A came from: `config`, `file`, `assumed` or `--alpha`; None
    where there is none (a dense ΔW). `notes` are what its reader must say, such as that a scale was assumed.
    """

    source: str
    format: str
    entries: dict[str, Entry]
    vectors: dict[str, Entry]
    """ΔW of biases and norms, which have no singular values."""
    scale_source: str | None = None
    notes: tuple[str, ...] = ()


def open_adapter(source: str | Path, *, base: str | Path | None = None, alpha: float | None = None) -> Adapter:
    """What a file, a folder or a Hub id holds. InputError where it is of no known format, or damaged.

    `base`: the untouched weights, where ΔW is the difference of two checkpoints, or needs W0 (DoRA). `alpha`: the α
    of formats that do not keep theirs.
    """
    found = _find(Source(path=Path(source), base=Path(base) if base else None, alpha=alpha))
    if not found:
        raise InputError(f"{source}: holds no adapter of a known format")
    sources = [each.scale_source for each in found if each.scale_source]
    entries = _entries(found)
    matrices = _matrices(entries)
    return Adapter(
        source=str(source),
        format=" + ".join(dict.fromkeys(each.format for each in found)),
        entries=matrices,
        vectors={parameter: entry for parameter, entry in entries.items() if parameter not in matrices},
        scale_source=sources[0] if sources else None,
        notes=tuple(note for each in found for note in each.notes),
    )


def load_layers(adapter: Adapter) -> Iterator[LayerSVD]:
    """Every matrix ΔW as a thin SVD, by parameter, in a stream: memory holds one layer."""
    for entry in adapter.entries.values():
        yield load_layer(entry)


def read_updates(folder: Path) -> Iterator[Update]:
    """Every ΔW in `folder` by parameter, one at a time, vectors included. InputError where a file is not whole.

    What is a `part` of one (DoRA's sBA) is left out.
    """
    for parameter, entry in _entries(_find(Source(path=Path(folder)))).items():
        update = entry.load()
        if isinstance(update, Update) and update.part:
            continue
        if isinstance(update, LayerSVD):
            raise InputError(f"{folder}: {parameter}: only singular values and vectors of ΔW were kept (svd:K)")
        yield update


def read_layers(folder: Path) -> Iterator[LayerSVD]:
    """Every matrix ΔW in `folder` as a thin SVD, by parameter, one at a time; vectors (biases, norms) are skipped."""
    for entry in open_layers(folder).values():
        yield load_layer(entry)


def open_layers(folder: Path) -> dict[str, Entry]:
    """What `read_layers` would give, by parameter; reads headers only. InputError where tensors do not fit."""
    return _matrices(_entries(_find(Source(path=Path(folder)))))


def _matrices(entries: dict[str, Entry]) -> dict[str, Entry]:
    return {parameter: entry for parameter, entry in entries.items() if entry.shape[1] > 1}


def load_layer(entry: Entry) -> LayerSVD:
    """Read one layer, and decompose it. InputError where it is damaged."""
    with one_thread():
        update = entry.load()
    if isinstance(update, LayerSVD):
        return update
    return LayerSVD(
        parameter=update.parameter,
        svd=decompose(update, DENSE_VECTORS if update.A is None else None),
        rank=None if update.A is None else update.B.shape[1],
        base_norm=update.base_norm,
        precision=update.precision,
        scale_source=update.scale_source,
        update=update,
    )


def decompose(update: Update, keep: int | None = None) -> ThinSVD:
    """The thin SVD of ΔW, with `keep` singular vectors at most. InputError where it holds NaN or overflows.

    Only a large dense ΔW is worth several threads, and its way to the GPU.
    """
    large = update.A is None and min(update.shape) >= _LARGE
    with contextlib.nullcontext() if large else one_thread():
        try:
            B = update.B.cuda() if large and torch.cuda.is_available() else update.B
            svd = thin_svd(B, update.A, keep=keep)
        except ValueError as error:
            raise InputError(f"{update.parameter}: {error}") from None
    return ThinSVD(U=svd.U.cpu(), S=svd.S.cpu(), Vh=svd.Vh.cpu())


def _find(source: Source) -> list[Found]:
    """What each reader has found there; nothing where the content is of no known format."""
    readers = (importlib.import_module(f"lorabench.readers.{name}") for name in plugins.names("readers"))
    return [found for reader in readers if (found := reader.find(source)) is not None]


def _entries(found: list[Found]) -> dict[str, Entry]:
    return dict(sorted((parameter, entry) for each in found for parameter, entry in each.entries.items()))
