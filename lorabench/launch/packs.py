"""Which runs share their forward and backward passes: those on one base, which differ in what is a run's own alone.

Nothing here needs torch; how many at a time pay is `lorabench.launch.pack_size`'s to say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorabench.config.decode import InputError, show
from lorabench.models.denoisers import AUTO_CLASS
from lorabench.spec.run_spec import RunSpec

OWN = (
    "method", "lr", "schedule", "warmup", "weight_decay", "beta1", "beta2", "epsilon", "clip", "seed", "keep",
    "snapshot_every", "serving",
)  # fmt: skip
"""The keys in which runs on one base may differ."""


@dataclass(frozen=True, kw_only=True)
class Ride:
    """Whom a run can be computed with."""

    key: str
    """The same of all those."""
    size: int
    """How many at most."""
    weight: int = 0
    """Parameters that it trains."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How runs are to be packed, and what there is for them."""

    size: int | None = None
    """Runs in a pack at most (None: as many as pay and fit; 1: none)."""
    device: str = "auto"
    workers: int = 1
    """Packs at a time that share the device."""
    gpu: str | None = None
    """The kind, where this machine has none of it."""
    alone: frozenset[str] = frozenset()
    """Runs that are in no pack, for what they cost is asked."""


def most_in_pack(text: int | str) -> int | None:
    """What is asked for as `auto`, `off` or a number, as `Asked.size` has it. InputError for anything else."""
    if text in ("auto", "off"):
        return None if text == "auto" else 1
    if not isinstance(text, int) or text < 1:
        raise InputError(f"pack = {show(text)}: must be auto, off or a number of at least 1")
    return text


def unshared(spec: RunSpec) -> str:
    """Why a run can never share its passes, as far as its spec tells; empty where it may."""
    if not spec.method.shares_passes:
        return f'method.name = "{spec.method.name}", as it is set, trains other than factors or needs passes of its own'
    if not spec.objective.shares_passes:
        return f'objective.name = "{spec.objective.name}" has passes of its own'
    if spec.gradient_checkpointing and spec.to_json()["method"].get("dropout", 0.0) > 0:
        return "dropout is drawn anew under gradient_checkpointing"
    if spec.padding == "free":
        return 'padding = "free" lays the batch of a run end to end'
    if not spec.optimizer.steps_rows:
        return f'optimizer.name = "{spec.optimizer.name}" does not step the factors of several runs at once'
    if any("labels" in task.sequences for task in spec.stages):
        return f'task.name = "{spec.task.name}" has a decoder'
    if any(task.auto_class == AUTO_CLASS for task in spec.stages):
        return f'task.name = "{spec.task.name}" trains a denoiser, whose runs are computed alone'
    return ""


def key_of(spec: RunSpec) -> str | None:
    """The same of runs that can share their passes, as far as their specs tell; None of one that never can."""
    if unshared(spec):
        return None
    table = spec.to_json()
    shared = {key: value for key, value in table.items() if key not in OWN}
    return json.dumps(shared | {"adapter_dtype": table["method"].get("adapter_dtype")}, sort_keys=True)


def in_packs(runs: Sequence[RunSpec], known: dict[str, Ride], workers: int) -> list[list[str]]:
    """The packs of runs, by their ids, each the largest runs first.

    They are as few as `Ride.size` allows, as many for each worker, of about as many runs, and about as much work: runs
    of all sizes are dealt out to them in turn.
    """
    alike: dict[str, list[str]] = {}
    for spec in runs:
        if spec.id in known:
            alike.setdefault(known[spec.id].key, []).append(spec.id)
    found = []
    for ids in alike.values():
        ids.sort(key=lambda run_id: -known[run_id].weight)
        number = math.ceil(len(ids) / known[ids[0]].size)
        number = min(math.ceil(number / workers) * workers, len(ids))
        found += [pack for place in range(number) if len(pack := ids[place::number]) > 1]
    return found


def packs_text(packs: Sequence[Sequence[str]]) -> str:
    """`64 runs in 4 packs of 16`; empty where there is no pack."""
    if not packs:
        return ""
    sizes = sorted(set(map(len, packs)))
    several = "1 pack" if len(packs) == 1 else f"{len(packs)} packs"
    return f"{sum(map(len, packs))} runs in {several} of {' to '.join(map(str, (sizes[0], sizes[-1])[: len(sizes)]))}"
