"""One adapter's compressions: the SVD of every ΔW, the files, and the models to evaluate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorabench.adapters.compression.compressible import (
    Subject,
    load_updates,
    matrices,
    modules_of,
    saved_whole,
    trained_head,
)
from lorabench.adapters.compression.truncation import Carried, Cut, Place, cut, places, write_adapter
from lorabench.config.decode import InputError
from lorabench.config.digests import file_digests
from lorabench.config.json_file import read_json
from lorabench.methods._patterns import config_as_trained
from lorabench.models import base_model
from lorabench.models.weights import add_update, is_conv1d
from lorabench.training import environment
from lorabench.training.base import seeded_base
from lorabench.training.evaluation import metrics_of, retention_of
from lorabench.training.examples import Examples, prepare_stages
from lorabench.updates.modules import Modules, of_other_models
from lorabench.updates.peftfile import carried as carried_fields
from lorabench.updates.peftfile import whole_folder
from lorabench.updates.readers._entry import Entry, TensorFile
from lorabench.updates.readers.peft_lora import ADAPTER_FILE, CONFIG_FILE, Factors
from lorabench.updates.update import Update


class Compressor:
    """A subject, compressed and evaluated. What is loaded is loaded when first used; ΔW layer by layer."""

    def __init__(self, subject: Subject, device: torch.device):
        self.subject, self.device, self.spec = subject, device, subject.spec

    @cached_property
    def stages(self) -> list[Examples]:
        assert self.spec is not None
        torch.set_num_threads(self.spec.threads)
        return prepare_stages(self.spec)

    @cached_property
    def skeleton(self) -> nn.Module | None:
        """The base without weights; None where no run says which it is."""
        return base_model.skeleton(self.spec, self.stages[0].model_options) if self.spec else None

    @cached_property
    def carried(self) -> Carried:
        """What was trained in full beside the factors."""
        found = saved_whole(self.modules)
        heads = base_model.new_heads(self.skeleton) if self.skeleton is not None else []
        if self.subject.own and heads and not found.beside.modules:
            return trained_head(self.subject, self.full(), heads)
        return found

    @cached_property
    def modules(self) -> Modules:
        """Their names in the model."""
        return modules_of(self.subject)

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """What is compressed."""
        return matrices(self.subject, self.modules, self.carried.names)

    @cached_property
    def where(self) -> dict[str, Place]:
        """By layer."""
        return places(self.skeleton, self.entries, self.modules)

    @property
    def environment(self) -> dict[str, Any]:
        weights = base_model.fingerprint(self.spec) if self.spec else {}
        return environment.describe(self.device) | weights

    def size(self) -> dict[str, Any]:
        """Of the adapter as it is: parameters as they are stored, a head apart; no ranks where a ΔW is dense."""
        shapes = [_rank_and_size(update) for update in load_updates(self.entries)]
        ranks = [rank for rank, _ in shapes if rank is not None]
        stored = _stored_parameters(self.subject.folder)
        return {
            "ranks": _span(ranks) if len(ranks) == len(shapes) else None,
            "num_parameters": sum(count for _, count in shapes) if stored is None else stored,
            "bytes": self.subject.num_bytes,
        }

    def write(self, folders: dict[float, Path]) -> dict[float, dict[str, Any]]:
        """Write the adapter of each energy to its folder; what is known of each. Memory holds them, and one ΔW."""
        if not folders:
            return {}
        where, dtype = self.where, stored_dtype(self.entries)
        layers = [cuts for update in load_updates(self.entries) if (cuts := cut(update, list(folders), dtype))]
        if not layers:
            raise InputError(f"{self.subject.name}: every ΔW is 0: there is nothing to compress")
        tied = {layer: place.twin for layer, place in where.items() if place.twin}
        made = {}
        for number, (energy, folder) in enumerate(folders.items()):
            cuts = [layer[number] for layer in layers]
            with whole_folder(folder) as temporary:
                write_adapter(temporary, cuts, where, self.carried, self._options())
            made[energy] = self._summary(cuts, folder) | {"tied": tied}
        return made

    def _summary(self, cuts: Sequence[Cut], folder: Path) -> dict[str, Any]:
        energy = sum(each.energy for each in cuts)
        config = read_json(folder / CONFIG_FILE) or {}
        return {
            "kept": sum(each.kept for each in cuts) / energy,
            "relative_error": math.sqrt(sum(each.lost for each in cuts) / energy),
            "ranks": _span([each.new_rank for each in cuts]),
            "num_parameters": _stored_parameters(folder),
            "bytes": (folder / ADAPTER_FILE).stat().st_size,
            "rank_advice": {key: config[key] for key in ("r", "rank_pattern")},
            "left_out": self._left_out(energy, len(cuts)),
            "layers": [_row(each) for each in cuts],
            "files": file_digests(folder, folder.parent),
        }

    def _left_out(self, energy: float, num_layers: int) -> dict[str, Any]:
        """What two factors cannot hold, or need not, and what was read from no file."""
        vectors = self.subject.adapter.vectors.keys() & self.modules.entries.keys() - self.carried.names
        entries = {p: self.modules.entries[p] for p in sorted(vectors)}
        squares = [float(update.dense().double().square().sum()) for update in load_updates(entries)]
        return {
            "num_vectors": len(squares),
            "energy_of_vectors": sum(squares) / (energy + sum(squares)),
            "num_unchanged": len(self.entries) - num_layers,
            "tensors": list(self.subject.adapter.left_out),
            "models": list(of_other_models(self.subject.adapter, [self.modules])),
        }

    def _options(self) -> dict[str, Any]:
        """What PEFT's configuration says beside the ranks."""
        options = carried_fields(self.subject.config)
        if self.spec is None or self.skeleton is None:
            return options
        transposed = any(is_conv1d(self.skeleton.get_submodule(place.module)) for place in self.where.values())
        source = {"base_model_name_or_path": self.spec.model, "revision": self.spec.revision}
        named = options | source if self.subject.own else source | options
        return named | {"task_type": base_model.task_type(self.skeleton), "fan_in_fan_out": transposed}

    def base(self) -> Any:
        assert self.spec is not None
        return seeded_base(self.spec, self.stages[0], self.device)

    def full(self) -> nn.Module:
        """The base with the adapter as it is: by PEFT where it is PEFT's, by its method, else W0 + ΔW."""
        assert self.spec is not None
        subject, config = self.subject, self.subject.config
        if config.get("peft_type") == "LORA" and subject.folder:
            return self.with_adapter(subject.folder)
        if subject.own and subject.folder:
            return self.spec.method.load(self.base(), subject.folder, self.spec)
        if self.spec.quantization != "none":
            raise InputError(
                f"--like {self.spec.id}: is quantized, and {subject.adapter.format} cannot be added to that"
            )
        tuned = self.base()
        vectors = {p: entry for p, entry in self.modules.entries.items() if p in subject.adapter.vectors}
        for update in load_updates(matrices(subject, self.modules, frozenset()) | vectors):
            place = self.where.get(update.layer)
            add_update(tuned, replace(update, parameter=f"{place.module}.weight") if place else update)
        return tuned

    def with_adapter(self, folder: Path) -> nn.Module:
        """The base with an adapter in PEFT's format."""
        from peft import PeftModel

        return PeftModel.from_pretrained(self.base(), str(folder), config=config_as_trained(folder))

    def metrics(self, tuned: nn.Module) -> dict[str, float]:
        """Validation of the run's last task, and retention where there is any."""
        assert self.spec is not None
        valid = metrics_of(tuned, self.spec, self.stages[-1], "validation")
        return valid | retention_of(tuned, self.spec, self.stages)


def stored_dtype(entries: dict[str, Entry]) -> torch.dtype:
    """What the factors are written in: as they were, where all are of one kind; a dense ΔW's in float32."""
    dtypes = {e.tensors.read(e.A).dtype if isinstance(e, Factors) else torch.float32 for e in entries.values()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _stored_parameters(folder: Path | None) -> int | None:
    """Entries of an adapter's factors in PEFT's format, without what was saved whole beside them.

    None where there is no such file.
    """
    if folder is None or not (folder / ADAPTER_FILE).exists():
        return None
    file = TensorFile(folder / ADAPTER_FILE)
    factors = [name for name in file.names if ".lora_" in name]
    return sum(math.prod(file.shape(name)) for name in factors or file.names)


def _rank_and_size(update: Update) -> tuple[int | None, int]:
    """None for the rank of a dense ΔW."""
    if update.A is None:
        return None, update.B.numel()
    return update.B.shape[1], update.B.numel() + update.A.numel()


def _span(ranks: list[int]) -> dict[str, float]:
    return {"min": min(ranks), "median": statistics.median(ranks), "max": max(ranks)}


def _row(each: Cut) -> dict[str, Any]:
    return {
        "layer": each.layer,
        "rank_before": each.rank,
        "rank": each.new_rank,
        "kept": each.kept / each.energy,
        "relative_error": math.sqrt(each.lost / each.energy),
    }
