"""Updates from files: what lorabench writes, and adapters of others. Nothing is unpickled, no model is built.

Add a format by adding one file to `lorabench/updates/readers/` with `find(source)`: what it has found there, None where
the content is not of its format. A folder may hold several (an adapter, and the dense ΔW of a task head).
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorabench.config import plugins
from lorabench.config.decode import InputError
from lorabench.config.quote import counted
from lorabench.linalg.decompose import ThinSVD, one_thread, thin_svd
from lorabench.processes.machine import available_cores
from lorabench.updates.base import LARGE, best_device
from lorabench.updates.layer import LayerSVD
from lorabench.updates.locate import adapter_folders, adapter_path, weights_path
from lorabench.updates.readers._entry import CONFIG_FILE, Entry, Found, Other, Source
from lorabench.updates.readers._gguf_file import GGUF_SUFFIX
from lorabench.updates.tensorfile import SUFFIXES, open_tensors
from lorabench.updates.update import DORA_PART, Update
from lorabench.updates.weightfile import some

VERSION = 3
"""Part of every analysis's cache key: raise it when the same file reads as other numbers."""
AS_EVER = 1
"""The version of runs of which every version has read the same numbers."""
DENSE_VECTORS = 64
"""Singular vectors kept of a dense ΔW; of a factored one all r are."""
BATCH_BYTES = 2 * 2**20
"""Of factors that are decomposed together: what a core's cache holds."""
BATCHES = 4
"""Read before the first of them is waited for."""
OWN = ("delta", "peft_lora", "svd")
"""Readers of what lorabench writes."""
_EXPERT = re.compile(r"\[\d+\]\.weight$")
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
    config: dict[str, Any] = field(default_factory=dict)
    """The PEFT configuration that belongs to the file, every field as it stands there; empty where there is none."""
    others: dict[str, Other] = field(default_factory=dict)
    """What the file holds beside the factors of ΔW, trained and saved whole: by the parameter's name in the untouched
    model (`model.norm.weight`; PEFT's `MODULE.base_layer.bias` is `MODULE.bias`), or by PEFT's own where there is none
    (`MODULE.lora_B.bias`, `MODULE.token_adapter.trainable_tokens_delta`). Where the base is known, the ΔW of a whole
    weight stands in `entries` or `vectors` too, by the base's name."""
    left_out: tuple[str, ...] = ()
    """Tensors of the file that are in none of these, by their names there, and fields of a configuration that is not
    PEFT's and that change nothing here (`adapter_config.json: FIELD`). `notes` speak of them."""

    @property
    def num_layers(self) -> int:
        """How many modules `entries` are of; a part of a ΔW (`MODULE[sBA]`) is no further one."""
        return len({parameter.replace(f"[{DORA_PART}]", "") for parameter in self.entries})


def version_of(method: dict[str, Any]) -> int:
    """The version of what a run of lorabench has saved: of most methods it reads as it always has.

    Patterns that overlap, what PEFT's further tuners save, and an adapter's several parts were once read wrong.
    """
    was_wrong = method.get("rank_pattern") or method.get("alpha_pattern") or method["name"] in ("peft", "hybrid")
    return VERSION if was_wrong else AS_EVER


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
    left_out = tuple(name for each in found for name in each.left_out)
    notes = [*(note for each in found for note in each.notes), *_left_out_notes(left_out)]
    if not matrices:
        raise InputError(f"{source}: {'; '.join(notes) or 'holds no change of a weight matrix (ΔW)'}")
    if not any(each.config.get("layer_replication") for each in found if each.config):
        notes += _lacking(given, matrices)
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
        config=next((each.config for each in found if each.config), {}),
        others={name: other for each in found for name, other in each.others.items()},
        left_out=left_out,
    )


def _lacking(source: Source, layers: Iterable[str]) -> Iterator[str]:
    """A note of the experts (`MODULE[e]`) whose stack the given base does not have: it may keep them one by one."""
    if source.weights is None:
        return
    stacks = {layer: _EXPERT.sub("", layer) for layer in layers if _EXPERT.search(layer)}
    lacking = [layer for layer, name in stacks.items() if not source.weights.find(name)]
    if lacking:
        yield (
            f"W0 of {counted(len(lacking), 'layer')}, such as {lacking[0]}, is not known: the base does not keep its "
            "experts as one stack"
        )


def _left_out_notes(left_out: Iterable[str]) -> Iterator[str]:
    names = sorted(left_out)
    fields = [name for name in names if name.startswith(f"{CONFIG_FILE}: ")]
    tensors = [name for name in names if name not in fields]
    for what, all_of in (("tensor", tensors), ("field", fields)):
        if all_of:
            yield f"{counted(len(all_of), what)} left out, such as {all_of[0]}"


def load_layers(adapter: Adapter) -> Iterator[LayerSVD]:
    """Every matrix ΔW as a thin SVD, by parameter, in a stream: memory holds one dense layer, or several of factors.

    Factors of one shape are decomposed together up to BATCH_BYTES: ten times as fast where layers are tiny, since most
    of the time is then that of calls, and no slower where they are large. Batches go to a thread a core, while the
    next are read.
    """
    entries = iter(adapter.entries.values())
    with ThreadPoolExecutor(available_cores()) as pool:
        while layers := _next_layers(entries, pool):
            yield from layers


def _next_layers(entries: Iterator[Entry], pool: ThreadPoolExecutor) -> list[LayerSVD]:
    """The next BATCHES batches, or fewer before a dense ΔW, which stands alone on all threads; empty at the end."""
    batches, batch, size, dense = [], [], 0, None
    with one_thread():
        for entry in entries:
            loaded = entry.load()
            if isinstance(loaded, LayerSVD) or loaded.A is None:
                dense = loaded
                break
            batch.append(loaded)
            size += loaded.B.nbytes + loaded.A.nbytes
            if size >= BATCH_BYTES:
                batches.append(pool.submit(_decomposed, batch))
                batch, size = [], 0
                if len(batches) == BATCHES:
                    break
        last = _decomposed(batch)
        layers = [layer for done in batches for layer in done.result()] + last
    if isinstance(dense, Update):
        dense = _as_layer(dense, decompose(dense, DENSE_VECTORS))
    return layers if dense is None else [*layers, dense]


def _decomposed(updates: list[Update]) -> list[LayerSVD]:
    """The layers in their order; those that have factors of one shape are decomposed together."""
    groups: dict[Any, list[int]] = {}
    for index, update in enumerate(updates):
        groups.setdefault((update.shape, update.B.shape, *_dtypes(update)), []).append(index)
    svds: dict[int, ThinSVD] = {}
    for members in groups.values():
        first, *others = (updates[index] for index in members)
        with _named(first.parameter):
            if not others:
                svds[members[0]] = thin_svd(first.B, first.A)
                continue
            B, A = (torch.stack([getattr(updates[index], factor) for index in members]) for factor in ("B", "A"))
            svd = thin_svd(B, A)
        svds |= {i: ThinSVD(U=U, S=S, Vh=Vh) for i, U, S, Vh in zip(members, svd.U, svd.S, svd.Vh, strict=True)}
    return [_as_layer(update, svds[index]) for index, update in enumerate(updates)]


def _dtypes(update: Update) -> list[torch.dtype]:
    return [factor.dtype for factor in (update.B, update.A) if factor is not None]


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
    """What the one format finds that claims the source, of several the one that uses all tensors; lorabench's own may
    lie beside PEFT's. InputError for none."""
    names = [name for name in plugins.names("readers") if name != LAST]
    found = _find(source, names) or _find(source, [LAST])
    claimed = {each.format for each in found}
    if len(claimed) > 1 and claimed != {"lorabench", "peft"}:
        whole = [each for each in found if not each.left_out]
        if len({each.format for each in whole}) == 1:
            return whole
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
        return f"{what} file of tensors ({', '.join((*SUFFIXES, GGUF_SUFFIX))})"
    known = sorted({"lorabench", "peft", *names} - set(OWN))
    return f"of no known format. Keys found: {some(keys)}. Known formats: {', '.join(known)}, two {LAST} (with --base)"


def _find(source: Source, names: Iterable[str]) -> list[Found]:
    """What each of these readers has found there; nothing where the content is not of its format."""
    readers = [importlib.import_module(f"lorabench.updates.readers.{name}") for name in names]
    return [found for reader in readers if (found := reader.find(source)) is not None]


def _entries(found: list[Found]) -> dict[str, Entry]:
    """Of a ΔW that lies there dense and as PEFT's factors, the factors."""
    entries = {parameter: entry for each in found for parameter, entry in each.entries.items()}
    return dict(sorted(entries.items(), key=lambda item: item[0]))
