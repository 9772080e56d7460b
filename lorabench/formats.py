"""Updates from files: what lorabench writes, and adapters of others. Nothing is unpickled, no model is built.

Add a format by adding one file to `lorabench/readers/` with `find(source)`: what it has found there, None where the
content is not of its format. A folder may hold several (an adapter, and the dense ΔW of a task head).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorabench import plugins
from lorabench.base import LARGE, best_device
from lorabench.decode import InputError
from lorabench.layer import LayerSVD
from lorabench.linalg import ThinSVD, one_thread, thin_svd
from lorabench.locate import adapter_folders, adapter_path, weights_path
from lorabench.readers._entry import Entry, Found, Source
from lorabench.tensorfile import SUFFIXES, open_tensors
from lorabench.update import Update
from lorabench.weightfile import some

VERSION = 1
"""Part of every analysis's cache key: raise it when the same file reads as other numbers."""
DENSE_VECTORS = 64
"""Singular vectors kept of a dense ΔW; of a factored one all r are."""
BATCH_BYTES = 2 * 2**20
"""Of factors that are decomposed together: what a core's cache holds."""
OWN = ("delta", "peft_lora", "svd")
"""Readers of what lorabench writes."""
LAST = "checkpoints"
"""Reader of what no other claims: any file of weights may be a model's."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """A file or folder that holds what a fine-tuning changed: every ΔW by parameter, not read yet.

    `scale_source` says where the scale s of ΔW = s B A came from: `config`, `file`, `assumed` or `--alpha`; None
    where there is none (a dense ΔW). `notes` are what its reader must say, such as that a scale was assumed.
    """

    source: str
    format: str
    entries: dict[str, Entry]
    vectors: dict[str, Entry] = field(default_factory=dict)
    """ΔW of biases and norms, which have no singular values."""
    scale_source: str | None = None
    notes: tuple[str, ...] = ()


def open_adapter(source: str | Path, *, base: str | Path | None = None, alpha: float | None = None) -> Adapter:
    """What a file, a folder, a run's folder or a Hub id holds. InputError where it is of no known format, or damaged.

    `base`: the untouched weights (a file, a folder, a Hub id or `builtin:NAME`), where ΔW is the difference of two
    checkpoints, or needs W0 (DoRA). `alpha`: the α of formats that do not keep theirs.
    """
    path = adapter_path(source)
    given = Source(path=path, base=weights_path(base) if base else None, alpha=alpha)
    found = _claimed(given)
    entries = _entries(found)
    matrices = _matrices(entries)
    notes = [note for each in found for note in each.notes]
    if not matrices:
        raise InputError(f"{source}: {'; '.join(notes) or 'holds no change of a weight matrix (ΔW)'}")
    if others := adapter_folders(path):
        notes.append(f"more adapters in sub-folders: {', '.join(others)} (open {source}/{others[0]})")
    sources = [each.scale_source for each in found if each.scale_source]
    return Adapter(
        source=str(source),
        format=" + ".join(dict.fromkeys(each.format for each in found)),
        entries=matrices,
        vectors={parameter: entry for parameter, entry in entries.items() if parameter not in matrices},
        scale_source=sources[0] if sources else None,
        notes=tuple(notes),
    )


def load_layers(adapter: Adapter) -> Iterator[LayerSVD]:
    """Every matrix ΔW as a thin SVD, by parameter, in a stream: memory holds one layer, or several small ones.

    Factors of one shape are decomposed together up to BATCH_BYTES: ten times as fast where layers are tiny, since most
    of the time is then that of calls, and no slower where they are large.
    """
    window: list[Update | LayerSVD] = []
    size = 0
    for entry in adapter.entries.values():
        loaded = entry.load()
        if window and size + _bytes(loaded) > BATCH_BYTES:
            yield from _decomposed(window)
            window, size = [], 0
        window.append(loaded)
        size += _bytes(loaded)
    yield from _decomposed(window)


def _bytes(loaded: Update | LayerSVD) -> int:
    if isinstance(loaded, LayerSVD) or loaded.A is None:
        return BATCH_BYTES  # stands alone
    return loaded.B.nbytes + loaded.A.nbytes


def _decomposed(window: list[Update | LayerSVD]) -> Iterator[LayerSVD]:
    """The layers in their order; those that have factors of one shape are decomposed together."""
    groups: dict[Any, list[int]] = {}
    for index, loaded in enumerate(window):
        if isinstance(loaded, Update) and loaded.A is not None:
            groups.setdefault((loaded.B.shape, loaded.A.shape, loaded.B.dtype, loaded.A.dtype), []).append(index)
    svds: dict[int, ThinSVD] = {}
    for members in groups.values():
        updates = [window[index] for index in members]
        B, A = (torch.stack([getattr(update, factor) for update in updates]) for factor in ("B", "A"))
        with one_thread(), _named(updates[0].parameter):
            svd = thin_svd(B, A)
        svds |= {i: ThinSVD(U=U, S=S, Vh=Vh) for i, U, S, Vh in zip(members, svd.U, svd.S, svd.Vh, strict=True)}
    for index, loaded in enumerate(window):
        yield (
            loaded
            if isinstance(loaded, LayerSVD)
            else _as_layer(loaded, svds.get(index) or decompose(loaded, _kept(loaded)))
        )


def read_updates(folder: Path) -> Iterator[Update]:
    """Every ΔW in `folder` by parameter, one at a time, vectors included. InputError where a file is not whole.

    What is a `part` of one (DoRA's sBA) is left out.
    """
    for parameter, entry in _entries(_find(Source(path=Path(folder)), OWN)).items():
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
    return _matrices(_entries(_find(Source(path=Path(folder)), OWN)))


def _matrices(entries: dict[str, Entry]) -> dict[str, Entry]:
    shapes = {parameter: entry.shape for parameter, entry in entries.items()}
    if empty := [parameter for parameter, shape in shapes.items() if 0 in shape]:
        raise InputError(f"{empty[0]}: ΔW {shapes[empty[0]]} has no entries")
    return {parameter: entry for parameter, entry in entries.items() if shapes[parameter][1] > 1}


def load_layer(entry: Entry) -> LayerSVD:
    """Read one layer, and decompose it. InputError where it is damaged."""
    with one_thread():
        update = entry.load()
    return update if isinstance(update, LayerSVD) else _as_layer(update, decompose(update, _kept(update)))


def _as_layer(update: Update, svd: ThinSVD) -> LayerSVD:
    return LayerSVD(
        parameter=update.parameter,
        svd=svd,
        rank=None if update.A is None else update.B.shape[1],
        base_norm=update.base_norm,
        precision=update.precision,
        scale=update.scale,
        scale_source=update.scale_source,
        update=update,
    )


def _kept(update: Update) -> int | None:
    return DENSE_VECTORS if update.A is None else None


def decompose(update: Update, keep: int | None = None) -> ThinSVD:
    """The thin SVD of ΔW, with `keep` singular vectors at most. InputError where it holds NaN or overflows.

    Only a large dense ΔW is worth several threads, and its way to the GPU.
    """
    large = update.A is None and min(update.shape) >= LARGE
    with contextlib.nullcontext() if large else one_thread(), _named(update.parameter):
        B = update.B.to(best_device(update.shape)) if large else update.B
        svd = thin_svd(B, update.A, keep=keep)
    return ThinSVD(U=svd.U.cpu(), S=svd.S.cpu(), Vh=svd.Vh.cpu())


@contextlib.contextmanager
def _named(parameter: str) -> Iterator[None]:
    """Say which layer it is that cannot be decomposed."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{parameter}: {error}") from None


def _claimed(source: Source) -> list[Found]:
    """What the one format finds that claims the source; lorabench's own may lie beside PEFT's. InputError for none."""
    names = [name for name in plugins.names("readers") if name != LAST]
    found = _find(source, names) or _find(source, [LAST])
    claimed = {each.format for each in found}
    if len(claimed) > 1 and claimed != {"lorabench", "peft"}:
        raise InputError(f"{source.path}: could be {' or '.join(sorted(claimed))}: give one file of it alone")
    if not found:
        raise InputError(f"{source.path}: {_unknown(source, names)}")
    return found


def _unknown(source: Source, names: list[str]) -> str:
    if inner := adapter_folders(source.path):
        return f"holds adapters in sub-folders: {', '.join(inner)}; open one, as {source.path / inner[0]}"
    files = source.files(*SUFFIXES)
    keys = [key for file in files[:4] for key in open_tensors(file).names]
    if not keys:
        what = "holds no" if source.path.is_dir() else "is no"
        return f"{what} file of tensors ({', '.join(SUFFIXES)})"
    known = sorted({"lorabench", "peft", *names} - set(OWN))
    return f"of no known format. Keys found: {some(keys)}. Known formats: {', '.join(known)}, two {LAST} (with --base)"


def _find(source: Source, names: Iterable[str]) -> list[Found]:
    """What each of these readers has found there; nothing where the content is not of its format."""
    readers = [importlib.import_module(f"lorabench.readers.{name}") for name in names]
    return [found for reader in readers if (found := reader.find(source)) is not None]


def _entries(found: list[Found]) -> dict[str, Entry]:
    return dict(sorted((parameter, entry) for each in found for parameter, entry in each.entries.items()))
