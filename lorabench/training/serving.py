"""What a run's result takes to use: inference, merging, storage, loading, swapping, several adapters at once.

Measured on what is left of the run: its weights are changed on the way. Each part stands alone, so that one that
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
from torch import Tensor, nn

from lorabench.spec.measures import NUM_RESIDENT
from lorabench.spec.method import LoadBase, Method
from lorabench.spec.run_spec import RunSpec
from lorabench.training.examples import Examples
from lorabench.training.inference import (
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
from lorabench.training.meter import GIB
from lorabench.training.state import Training
from lorabench.training.stop import Stopped
from lorabench.updates.update import DELTA_FILE

RESIDENT = ["default", *(f"task_{number}" for number in range(2, NUM_RESIDENT + 1))]
"""Names of adapters on one model; the first is PEFT's for the one that `Method.load` loads."""


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


def measure(training: Training, folder: Path, check: Callable[[], None]) -> tuple[dict[str, float], dict[str, str]]:
    """Measures by their names in MEASURES, and provenance, where `serving` says what was left out and why.

    The run's wall time is among them, what is done here included. `folder` is that of what the run has learned, and
    `check` may raise Stopped between two parts.
    """
    with training.meter.clock("serve"):
        training.model.zero_grad(set_to_none=True)
        del training.optimizer
        bench = _measured(
            Subject(
                spec=training.spec,
                model=training.model,
                load_base=training.base.untouched,
                examples=training.base.stages[-1],
                folder=folder,
                device=training.base.device,
            ),
            check,
        )
    return bench.measures | training.meter.wall_time(), bench.notes


def _measured(subject: Subject, check: Callable[[], None]) -> _Bench:
    bench = _Bench(subject)
    parts = (bench.prepare, bench.merging, bench.inference, bench.loading, bench.swapping, bench.mixing)
    for part in parts:
        try:
            check()
            with torch.no_grad():
                part()
        except Stopped as error:
            bench.left_out.append(f"stopped by {error} before {part.__name__}")
            break
        except Exception as error:  # whatever it is, what was trained and saved stands
            traceback.print_exc()
            bench.left_out.append(f"{part.__name__}: {_reason(error)}")
            if part == bench.prepare:
                break
    if bench.left_out:
        bench.notes["serving"] = "not measured: " + "; ".join(bench.left_out)
    return bench


class _Bench:
    """One method a part; each fills `measures`, `notes` and `left_out`."""

    base: nn.Module
    work: Workload

    def __init__(self, subject: Subject):
        self.subject, self.spec, self.method = subject, subject.spec, subject.spec.method
        self.several: nn.Module | None = None
        """A model that holds NUM_RESIDENT adapters."""
        self.merged: nn.Module | None = None
        """The run's own model where that is in the base's architecture; None where the method cannot be merged."""
        self.measures: dict[str, float] = {}
        self.notes: dict[str, str] = {}
        self.left_out: list[str] = []

    def prepare(self) -> None:
        """The base: out of the tuned model, sharing its frozen weights, else loaded anew, which takes its memory."""
        model, spec = as_served(self.subject.model, self.spec.dtype), self.spec
        base = self.method.unload(twin(model))
        source = "shares the tuned model's frozen weights"
        if base is None:
            base, source = as_served(self.subject.load_base(), spec.dtype).requires_grad_(False), "loaded anew"
        self.base = base
        self.work = workload(spec, self.subject.examples, base, self.subject.device)
        also = f", {NEW_TOKENS} generated" if self.work.generates else ""
        self.notes["inference"] = f"{self.work.about}{also}, {spec.dtype} without autocast; the base {source}"

    def merging(self) -> None:
        """Changes the weights that all models share: from here on their speed counts, not what they compute."""
        model, spec = self.subject.model, self.spec
        batch = checked_batch(self.subject.examples, self.subject.device)
        wanted = logits(model, batch)
        copied = twin(model)
        merged = self.method.merge(copied)
        if merged is None:
            self.notes["merge_error"] = "not applicable: what the method adds cannot be merged into the weights"
            return
        error = self.measures["merge_error"] = relative_error(logits(merged, batch), wanted)
        self.notes["merge_error"] = _verdict(error, spec)
        self.merged = model if merged is copied else as_served(merged, spec.dtype)

    def inference(self) -> None:
        """Base, unmerged and merged model in one race; one that is in the base's architecture is both of the latter."""
        models = {"unmerged": self.subject.model}
        if self.merged is not None and self.merged is not self.subject.model:
            models["merged"] = self.merged
        found = compare(self.base, models, self.work)
        if self.merged is self.subject.model:
            found |= {name.replace("unmerged", "merged"): value for name, value in found.items()}
        self.merged = None
        self.measures |= found
        self.notes["inference"] += f"; {', '.join(['base', *models])} in turn, in one race"

    def loading(self) -> None:
        """Bytes of one more task, and the time from disk onto the resident base."""
        if self.spec.keep != "updates":
            self.left_out.append(f'loading: keep = "{self.spec.keep}" leaves nothing that could be loaded')
            return
        folder = self.subject.folder
        self.measures["storage_bytes"] = sum(file.stat().st_size for file in stored_files(folder))
        times = self._fill_model() if self.method.holds_several else [row[0] for row in race([self._load_once])]
        self.measures["adapter_load_seconds"] = statistics.median(times)

    def _load_once(self) -> float:
        base = twin(self.base)
        return seconds(partial(self.method.load, base, self.subject.folder, self.spec), self.subject.device)

    def _fill_model(self) -> list[float]:
        """Seconds of each load but the first, onto one model that then holds NUM_RESIDENT adapters."""
        device, folder, dtype = self.subject.device, self.subject.folder, self.spec.dtype
        model = as_served(self.method.load(twin(self.base), folder, self.spec), dtype)
        before = held_bytes(model)
        load = partial(self.method.load_another, model, folder)
        times = [seconds(partial(load, name), device) for name in RESIDENT[1:]]
        self.several = as_served(model, dtype)
        self.measures["resident_adapter_gib"] = (held_bytes(model) - before) / len(RESIDENT[1:]) / GIB
        return times

    def swapping(self) -> None:
        """From one task to another: between adapters that the model holds, else by copying the other's tensors."""
        calls: list[Callable[[], None]]
        if self.several is not None:
            calls = [partial(self.method.activate, self.several, name) for name in RESIDENT]
            self.notes["adapter_swap_seconds"] = f"PEFT's set_adapter among {len(RESIDENT)} adapters on the device"
        elif not self.method.holds_several:
            calls = [self._copying()]
            self.notes["adapter_swap_seconds"] = "the other task's trained tensors, on the device, are copied over"
        else:
            return
        rows = race([partial(seconds, call, self.subject.device) for call in calls])
        self.measures["adapter_swap_seconds"] = statistics.median(value for row in rows for value in row)

    def _copying(self) -> Callable[[], None]:
        model = self.subject.model
        other = {name: tensor.clone() for name, tensor in self.method.trained_state(model).items()}
        self.measures["resident_adapter_gib"] = sum(tensor.nbytes for tensor in other.values()) / GIB
        return partial(self.method.restore, model, other)

    def mixing(self) -> None:
        """A batch whose rows are of different tasks: in one pass, or group by group with a swap before each."""
        if not self.method.mixes_adapters:
            for name in ("mixed_batch_seconds", "swapped_batch_seconds"):
                self.notes[name] = "not applicable: PEFT takes no batch of mixed adapters with this method"
        if self.several is None or not self.method.mixes_adapters:
            return
        model, work = self.several, self.work
        calls = [partial(mixed, model, work), partial(swapped, self.method, model, work)]
        rows = race([partial(seconds, call, self.subject.device) for call in calls])
        medians = [statistics.median(column) for column in zip(*rows, strict=True)]
        self.measures |= dict(zip(("mixed_batch_seconds", "swapped_batch_seconds"), medians, strict=True))


def mixed(model: nn.Module, work: Workload) -> Tensor:
    """Logits of its prompts, the first rows computed with the first adapter and so on: in one pass."""
    each = [name for name, group in _groups(work.ids).items() for _ in group]
    return work.output(model, work.ids, adapter_names=each)


def swapped(method: Method, model: nn.Module, work: Workload) -> Tensor:
    """The same, adapter after adapter."""
    found = []
    for name, group in _groups(work.ids).items():
        method.activate(model, name)
        found.append(work.output(model, group))
    return torch.cat(found)


def _groups(ids: Tensor) -> dict[str, Tensor]:
    return dict(zip(RESIDENT, ids.chunk(len(RESIDENT)), strict=True))


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
