"""What goes into a run's record: counts, fingerprints of its data, and all that was measured."""

from __future__ import annotations

import json
import traceback
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lorabench.config.decode import encode
from lorabench.spec.run_spec import task_names
from lorabench.store.record import RunRecord
from lorabench.training import flops, ranks, sequence
from lorabench.training import meter as meters
from lorabench.training.peak import peak_flops
from lorabench.training.stability import instability
from lorabench.training.state import Training, method_key


def begin(record: RunRecord, training: Training) -> None:
    """Put what is known before the first step into the record."""
    record.measures |= training.counts
    record.provenance |= training.remarks
    record.environment |= training.world.describe() | training.base.fingerprints


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
    rows, starts = map(json.loads, training.log), [row[i].get("valid_loss") for i, row in enumerate(training.rows[:-1])]
    measures, notes = instability(spec, [*rows], starts)
    record.measures |= measures
    record.provenance |= notes
    energy = ranks.energy(meter, world)
    if energy:
        record.measures["energy_joules"], record.provenance["energy_joules"] = energy
    if throughput:
        measures, notes = _utilization(training)
        record.measures |= measures
        record.provenance |= notes


def _utilization(training: Training) -> tuple[dict[str, float], dict[str, str]]:
    """FLOPs of a step, and the share of the device's peak that they take, with how each was made; on the first rank."""
    spec, meter, world = training.spec, training.meter, training.world
    rows = meter.step_rows
    shapes = sum(world.gather(Counter(shape for row in rows for shape in row[4])), Counter())
    if not world.is_first:
        return {}, {}
    if training.sizes - {world.size}:
        sizes = sorted(training.sizes | {world.size})
        return {}, {"model_flops_utilization": f"not measured: {sizes} processes, one after the other"}
    if training.skeleton is None or not all(row[4] for row in rows):
        return {}, {"flops_per_step": "not measured: the model, or what it was given before a resume, is not known"}
    try:
        per_step = _flops_per_step(training, training.skeleton, shapes, len(rows))
    except Exception as error:  # whatever a model does without numbers, what was trained stands
        traceback.print_exc()
        reason = traceback.format_exception_only(error)[-1].strip().partition("\n")[0]
        return {}, {"flops_per_step": f"not measured: the model cannot be counted without numbers: {reason}"}
    measures, notes = {"flops_per_step": per_step}, {"flops_per_step": flops.ABOUT}
    rate = per_step * len(rows) / sum(row[0] for row in rows) / world.size
    peak, source = training.base.once(("peak", spec.dtype), lambda: peak_flops(meter.device, spec.dtype))
    if rate > peak:
        peak, source = peak_flops(meter.device, spec.dtype, beyond=rate)
    times = f"{world.size} ranks of " if world.size > 1 else ""
    notes["model_flops_utilization"] = f"of {times}{peak / 1e12:.3g} TFLOP/s, {source}"
    if rate > peak:
        of = f"{rate / 1e12:.3g} TFLOP/s are more than the peak {notes['model_flops_utilization']}"
        return measures, notes | {"model_flops_utilization": f"not measured: {of}"}
    return measures | {"model_flops_utilization": rate / peak}, notes


def _flops_per_step(
    training: Training, skeleton: nn.Module, shapes: Mapping[flops.Shape, int], num_steps: int
) -> float:
    key = ("flops", method_key(training.spec), frozenset(shapes.items()), num_steps)
    return training.base.once(key, lambda: flops.of_step(skeleton, shapes, training.spec.method, num_steps))


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))
