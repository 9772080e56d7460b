"""What a run's result takes to use: inference, merging, storage, loading, swapping, several adapters at once.

Measured on what is left of the run: the tuned model is changed on the way. Each part stands alone, so that one that
fails (PEFT cannot merge into some quantized layers, memory runs out) leaves out its own measures only.
"""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lorabench.examples import Examples
from lorabench.inference import (
    NEW_TOKENS,
    TOLERANCE,
    Workload,
    as_served,
    checked_batch,
    compare,
    logits,
    race,
    relative_error,
    seconds,
    twin,
    workload,
)
from lorabench.meter import GIB
from lorabench.method import LoadBase
from lorabench.record import NUM_RESIDENT
from lorabench.spec import RunSpec
from lorabench.train import Stopped
from lorabench.update import DELTA_FILE

FIRST = "default"
"""PEFT's name for the adapter that `Method.load` loads."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A run that is trained and saved."""

    spec: RunSpec
    model: nn.Module
    load_base: LoadBase
    examples: Examples
    folder: Path
    """`updates/`, where it is kept."""
    device: torch.device


def measure(subject: Subject, check: Callable[[], None]) -> tuple[dict[str, float], dict[str, str]]:
    """Measures by their names in MEASURES, and provenance, where `serving` says what was left out and why.

    `check` may raise Stopped between two parts.
    """
    bench, failures = _Bench(subject), []
    for part in (bench.prepare, bench.inference, bench.storage, bench.residents, bench.merging):
        try:
            check()
            with torch.no_grad():
                part()
        except Stopped as error:
            failures.append(f"stopped by {error} before {part.__name__}")
            break
        except Exception as error:  # whatever it is, what was trained and saved stands
            traceback.print_exc()
            failures.append(f"{part.__name__}: {_reason(error)}")
            if part == bench.prepare:
                break
    if failures:
        bench.notes["serving"] = "; ".join(failures)
    return bench.measures, bench.notes


class _Bench:
    """One method a part; each fills `measures` and `notes`."""

    base: nn.Module
    work: Workload

    def __init__(self, subject: Subject):
        self.subject, self.spec, self.method = subject, subject.spec, subject.spec.method
        self.measures: dict[str, float] = {}
        self.notes: dict[str, str] = {}

    def prepare(self) -> None:
        """The base: out of the tuned model, sharing its frozen weights, else loaded anew, which takes its memory."""
        model, spec = as_served(self.subject.model, self.spec.dtype), self.spec
        base = self.method.unload(twin(model))
        source = "shares the tuned model's frozen weights"
        if base is None:
            base, source = as_served(self.subject.load_base(), spec.dtype).requires_grad_(False), "loaded anew"
        self.base = base
        self.work = workload(spec, self.subject.examples, base, self.subject.device)
        tokens = f"prompts of {self.work.ids.shape[1]} tokens"
        also = f", {NEW_TOKENS} generated" if self.work.generates else ""
        self.notes["inference"] = f"{tokens}{also}, {spec.dtype} without autocast; the base {source}"

    def inference(self) -> None:
        self.measures |= compare(self.base, self.subject.model, "unmerged", self.work)

    def storage(self) -> None:
        """Bytes of one more task, and the time from disk onto the resident base."""
        if self.spec.keep != "updates":
            return
        folder = self.subject.folder
        self.measures["storage_bytes"] = sum(file.stat().st_size for file in stored_files(folder))
        self.measures["adapter_load_seconds"] = statistics.median(row[0] for row in race([self._load_once]))

    def _load_once(self) -> float:
        base = twin(self.base)
        return seconds(lambda: self.method.load(base, self.subject.folder, self.spec), self.subject.device)

    def residents(self) -> None:
        """From one task to the other: of adapters that are resident, or by copying the other's tensors."""
        if not self.method.holds_several:
            self._copying()
        elif self.spec.keep == "updates":
            self._switching()

    def _copying(self) -> None:
        model, device = self.subject.model, self.subject.device
        other = {name: tensor.clone() for name, tensor in self.method.trained_state(model).items()}
        rows = race([partial(seconds, partial(self.method.restore, model, other), device)])
        self._swap(rows, sum(tensor.nbytes for tensor in other.values()))
        self.notes["adapter_swap_seconds"] = "the other task's trained tensors, on the device, are copied over"

    def _switching(self) -> None:
        spec, device, folder = self.spec, self.subject.device, self.subject.folder
        model = as_served(self.method.load(twin(self.base), folder, spec), spec.dtype)
        names, before = [FIRST, *(f"task_{number}" for number in range(2, NUM_RESIDENT + 1))], held_bytes(model)
        for name in names[1:]:
            self.method.load_another(model, folder, name)
        held = held_bytes(as_served(model, spec.dtype)) - before
        rows = race([partial(seconds, partial(self.method.activate, model, name), device) for name in names])
        self._swap(rows, held / len(names[1:]))
        self.notes["adapter_swap_seconds"] = f"PEFT's set_adapter among {len(names)} adapters on the device"
        if self.method.mixes_adapters:
            self._mixing(model, names)

    def _swap(self, rows: list[tuple[float, ...]], nbytes: float) -> None:
        self.measures["adapter_swap_seconds"] = statistics.median(value for row in rows for value in row)
        self.measures["resident_adapter_gib"] = nbytes / GIB

    def _mixing(self, model: nn.Module, names: list[str]) -> None:
        """A batch whose rows are of different tasks: in one pass, or group by group with a swap before each."""
        ids, device, options = self.work.ids, self.subject.device, self.work.options
        groups = dict(zip(names, ids.chunk(len(names)), strict=True))
        each = [name for name, group in groups.items() for _ in group]

        def swapped() -> None:
            for name, group in groups.items():
                self.method.activate(model, name)
                model(input_ids=group, **options)

        in_one_pass = partial(model, input_ids=ids, adapter_names=each, **options)
        rows = race([partial(seconds, in_one_pass, device), partial(seconds, swapped, device)])
        mixed, one_by_one = (statistics.median(column) for column in zip(*rows, strict=True))
        self.measures |= {"mixed_batch_seconds": mixed, "swapped_batch_seconds": one_by_one}

    def merging(self) -> None:
        """Last, for it changes the model in place, and the weights that the base shares: its values, not its speed."""
        model, spec = self.subject.model, self.spec
        batch = checked_batch(self.subject.examples, self.subject.device)
        wanted = logits(model, batch)
        merged = self.method.merge(model)
        if merged is None:
            return
        error = self.measures["merge_error"] = relative_error(logits(merged, batch), wanted)
        self.notes["merge_error"] = _verdict(error, spec)
        if merged is model:  # it was in the base's architecture all the time
            same = {name.replace("unmerged", "merged"): value for name, value in self.measures.items()}
            self.measures = same | self.measures
        else:
            self.measures = compare(self.base, as_served(merged, spec.dtype), "merged", self.work) | self.measures


def stored_files(folder: Path) -> list[Path]:
    """What `Method.load` needs of the files that `Method.save` wrote: an adapter with its configuration, else ΔW."""
    adapter = [folder / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    return adapter if adapter[0].exists() else [folder / DELTA_FILE]


def held_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, what several share counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in [*model.parameters(), *model.buffers()]}
    return sum(storage.nbytes() for storage in storages.values())


def _verdict(error: float, spec: RunSpec) -> str:
    if spec.quantization != "none":
        return f"the merged weights are quantized to {spec.quantization} again, which rounds them"
    where = "within" if error <= TOLERANCE[spec.dtype] else "above"
    return f"{where} the tolerance of {TOLERANCE[spec.dtype]:g} for {spec.dtype}"


def _reason(error: Exception) -> str:
    return traceback.format_exception_only(error)[-1].strip().partition("\n")[0]
