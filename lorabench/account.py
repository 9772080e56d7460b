"""What goes into a run's record: counts, fingerprints of its data, and all that was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorabench import meter as meters
from lorabench import ranks, sequence
from lorabench.decode import encode
from lorabench.examples import Examples
from lorabench.record import RunRecord
from lorabench.spec import task_names
from lorabench.training import Training


def fill(record: RunRecord, training: Training, folder: Path) -> None:
    """Put all that was measured into the record."""
    spec, meter, world = training.spec, training.meter, training.world
    memory, record.provenance["peak_gib"] = ranks.memory(meter, world)
    record.provenance["update"] = spec.method.about_update(spec)
    throughput = meter.throughput()
    record.measures |= memory | throughput | training.metrics | meter.wall_time()
    record.measures["optimizer_state_gib"] = _optimizer_bytes(training.optimizer) / meters.GIB
    if world.is_first:  # which has written them
        files = [file for file in (folder / "updates").rglob("*") if file.is_file()]
        record.measures["updates_bytes"] = sum(file.stat().st_size for file in files)
    if spec.tasks:
        found = sequence.matrices(training.rows)
        record.sequence = {"tasks": task_names([encode(task) for task in spec.tasks]), "matrices": found}
        record.measures |= sequence.measures(found)
    energy = ranks.energy(meter, world)
    if energy:
        record.measures["energy_joules"], record.provenance["energy_joules"] = energy
    if throughput and training.sizes - {world.size}:
        note = f"not measured: {sorted(training.sizes | {world.size})} processes, one after the other"
        record.provenance["model_flops_utilization"] = note
    elif throughput:
        tokens = sum(row[1] for row in meter.step_rows) / len(meter.step_rows)
        length = sum(row[2] for row in meter.step_rows) / len(meter.step_rows) / spec.batch_size
        flops = meters.model_flops_per_token(training.model, length) * tokens
        peak, source = meters.peak_flops(meter.device, spec.dtype)
        per_second = flops * throughput["tokens_per_second"] / tokens
        record.measures |= {"flops_per_step": flops, "model_flops_utilization": per_second / (peak * world.size)}
        times = f"{world.size} ranks of " if world.size > 1 else ""
        record.provenance["model_flops_utilization"] = f"of {times}{peak / 1e12:.3g} TFLOP/s, {source}"


def data_of(stages: list[Examples]) -> dict[str, Any]:
    """Fingerprints and notes by role: `task` and `retain`, with the task's number where there are several."""
    numbered = [(f" {number}" if len(stages) > 1 else "", examples) for number, examples in enumerate(stages, 1)]
    return {
        "data": {role + number: value for number, each in numbered for role, value in each.fingerprints.items()},
        "data_notes": {role + number: value for number, each in numbered for role, value in each.notes.items()},
    }


def counts_of(tuned: nn.Module, num_base: int, stages: list[Examples]) -> dict[str, float]:
    trainable = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    held = sum(t.nbytes for t in [*tuned.parameters(), *tuned.buffers()])
    return {
        "num_parameters": count(tuned),
        "num_trainable": trainable,
        "trainable_share": trainable / num_base,
        "num_train_examples": sum(len(examples.splits["train"]) for examples in stages),
        "model_gib": held / meters.GIB,
    }


def count(module: nn.Module) -> int:
    """Parameters; a 4-bit weight packs two into a byte."""
    packed = lambda p: 2 if type(p).__name__ == "Params4bit" else 1  # noqa: E731
    return sum(p.numel() * packed(p) for p in module.parameters())


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))
