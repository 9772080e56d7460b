"""What can be compressed: the adapter of a store's run, or any other that can be opened, and how it is evaluated."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorabench.adapters.compression.truncation import Carried
from lorabench.adapters.merging.adapters import find_run
from lorabench.config.decode import InputError
from lorabench.config.quote import clip, show_path
from lorabench.spec.run_spec import RunSpec, canonical_json
from lorabench.store.record import RunRecord
from lorabench.store.store import Store, check_run, check_updates
from lorabench.training.serving import stored_files
from lorabench.updates import formats
from lorabench.updates.layer import LayerSVD
from lorabench.updates.locate import adapter_path, weights_path
from lorabench.updates.modules import Modules, models_in, whole_name
from lorabench.updates.peftfile import Beside, beside, check_whole
from lorabench.updates.readers._entry import Entry, Source, read_json
from lorabench.updates.readers.peft_lora import CONFIG_FILE
from lorabench.updates.update import INITIAL_FILE, Update
from lorabench.updates.weightfile import WeightFiles

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".npz")


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """An adapter, and the run whose base, task and settings it is evaluated with: None where there is none.

    `own` says that it is that run's adapter. `folder` holds its files: None where they are not on this machine.
    `content` is a SHA-256 of all that was learned, and of the names that a given base has for it.
    """

    name: str
    adapter: formats.Adapter
    folder: Path | None
    content: str
    num_bytes: int | None
    record: RunRecord | None = None
    own: bool = False
    weights: WeightFiles | None = None
    """The untouched ones, where they were given."""

    @property
    def spec(self) -> RunSpec | None:
        return RunSpec.from_json(self.record.spec) if self.record else None

    @property
    def config(self) -> dict[str, Any]:
        """PEFT's configuration of it; empty where there is none."""
        if self.adapter.config or not self.own:
            return self.adapter.config
        file = self.folder / CONFIG_FILE if self.folder else None
        return read_json(file) if file and file.exists() else {}

    @property
    def notes(self) -> list[str]:
        return [*self.adapter.notes]


def open_subject(
    store: Store, given: str, *, like: str | None = None, base: str | None = None, alpha: float | None = None
) -> Subject:
    """A run, by its id, what this begins with, or its folder; else a file, a folder or a Hub id.

    Of a run, `like`, `base` and `alpha` cannot be given. InputError for what cannot be compressed.
    """
    path = Path(given)
    if path.parent.name == "runs" and (path / "spec.json").is_file():
        store, given = Store(path.parent.parent), path.resolve().name
    elif os.path.exists(path) or "/" in given:
        return _foreign(store, given, like, base, alpha)
    flags = {"--like": like, "--base": base, "--alpha": alpha}
    problems = [f"{flag} {value}: {given} is a run, which knows it" for flag, value in flags.items() if value]
    if problems:
        raise InputError(problems)
    if not given or not any(run_id.startswith(given) for run_id in store.run_ids()):
        raise InputError(
            f"ADAPTER = {clip(given)}: no such file or folder, and no run of {show_path(store.root)} begins so"
        )
    return _of_run(store, find_run(store, given))


def _of_run(store: Store, run_id: str) -> Subject:
    record, folder = store.done(run_id, "ADAPTER"), store.folder(run_id) / "updates"
    spec = RunSpec.from_json(record.spec)
    if spec.method.adds_computation:
        raise InputError(f"ADAPTER = {run_id}: {spec.method.name} adds computation that no ΔW stands for")
    if spec.keep != "updates":
        raise InputError(f'ADAPTER = {run_id}: has not kept its ΔW (keep = "{spec.keep}")')
    if (folder / INITIAL_FILE).exists():
        raise InputError(
            f"ADAPTER = {run_id}: is LoftQ, whose factors also make up for quantization; ΔW has no such part"
        )
    check_updates(folder.parent, record, f"ADAPTER = {run_id}")
    return Subject(
        name=run_id,
        adapter=formats.open_adapter(folder),
        folder=folder,
        content=hashlib.sha256(canonical_json(record.updates)).hexdigest(),
        num_bytes=sum(file.stat().st_size for file in stored_files(folder) if file.suffix in WEIGHTS),
        record=record,
        own=True,
    )


def _foreign(store: Store, given: str, like: str | None, base: str | None, alpha: float | None) -> Subject:
    check_run(given)
    adapter = formats.open_adapter(given, base=base, alpha=alpha)
    source = Source(path=adapter_path(given))
    subject = Subject(
        name=given,
        adapter=adapter,
        folder=source.folder,
        content="",
        num_bytes=sum(file.stat().st_size for file in source.files(*WEIGHTS)),
        record=store.done(find_run(store, like), "--like") if like else None,
        weights=WeightFiles(weights_path(base)) if base else None,
    )
    digest = hashlib.sha256(canonical_json(subject.config))
    for parameter, entry in (adapter.entries | adapter.vectors).items():
        update = _load(entry, parameter)
        for name, tensor in (("B", update.B), ("A", update.A)):
            _add(digest, f"{parameter}:{name}", tensor)
    for name, other in adapter.others.items():
        _add(digest, name, other.load())
    if weights := subject.weights:  # which say what the modules are called and are
        digest.update("".join(f"\0{name} {weights.stored_shape(name)}" for name in weights.names).encode())
    return Subject(**{**vars(subject), "content": digest.hexdigest()})


def _add(digest: Any, name: str, tensor: Tensor | None) -> None:
    if tensor is not None:
        digest.update(f"\0{name} {tuple(tensor.shape)}\0".encode() + tensor.float().contiguous().numpy().tobytes())


def saved_whole(modules: Modules) -> Carried:
    """What a file has beside the factors; the ΔW of it that is known."""
    names, entries = modules.whole, modules.entries
    changes = load_updates({name: entries[name] for name in sorted(names) if name in entries})
    return Carried(beside=beside(modules.adapter, modules.named), names=names, updates=tuple(changes))


def trained_head(subject: Subject, tuned: nn.Module, heads: list[str]) -> Carried:
    """The heads of a run that has kept their ΔW alone, out of its tuned model."""
    state, begins = tuned.state_dict(), tuple(f"{head}." for head in heads)
    tensors = {name: tensor.detach().cpu() for name, tensor in state.items() if name.startswith(begins)}
    entries = subject.adapter.entries | subject.adapter.vectors
    changes = load_updates({name: entry for name, entry in entries.items() if name in tensors})
    return Carried(
        beside=Beside(tensors=tensors, modules=tuple(heads)), names=frozenset(tensors), updates=tuple(changes)
    )


def modules_of(subject: Subject) -> Modules:
    """Names in the one model that the adapter is of. InputError where it is of several, or has no whole ΔW."""
    check_whole(subject.adapter)
    one, *others = models_in(subject.adapter, subject.weights)
    if others:
        names = ", ".join(modules.model for modules in (one, *others))
        raise InputError(
            f"{subject.name}: holds adapters of several models ({names}): --base tells which to compress; or convert "
            "it first, into a folder a model"
        )
    return one


def matrices(subject: Subject, modules: Modules, carried: frozenset[str]) -> dict[str, Entry]:
    """What is compressed: each matrix ΔW, less what is carried over, and less parts of one that is there as a whole."""
    entries = {p: e for p, e in modules.entries.items() if p in subject.adapter.entries and p not in carried}
    whole = {p: entry for p, entry in entries.items() if getattr(entry, "part", None) is None}
    alone = [p for p in entries if p not in whole and whole_name(p) not in whole]
    if alone:
        raise InputError(f"{subject.name}: {alone[0]}: is only a part of ΔW, and the whole is not known (--base)")
    if not whole:
        kinds = "vectors (biases, norms)" if subject.adapter.vectors else "a task head"
        raise InputError(f"{subject.name}: has changed nothing but {kinds}: there is no matrix to compress")
    return whole


def load_updates(entries: dict[str, Entry]) -> Iterator[Update]:
    """One at a time."""
    return (_load(entry, parameter) for parameter, entry in entries.items())


def _load(entry: Entry, parameter: str) -> Update:
    update = entry.load()
    if isinstance(update, LayerSVD):
        raise InputError(f"{parameter}: only singular values and vectors of ΔW were kept (svd:K)")
    return update
