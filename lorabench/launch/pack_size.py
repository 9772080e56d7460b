"""How many runs are computed in one pass: as many as pay, and fit in memory.

A pass of several small runs takes little longer than one's, for a device spends most of its time there on being asked
for the operations; a pass of large ones takes as long as theirs one after another, and the memory of all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lorabench.config.decode import InputError
from lorabench.launch.estimate import Counts, pack_bytes, pack_seconds
from lorabench.launch.packs import Asked, Ride, key_of, unshared
from lorabench.models.base_model import drawn_modules, new_heads, reads_images
from lorabench.processes.machine import free_memory
from lorabench.spec.run_spec import RunSpec

DROPS = ("dropout", "pdrop", "drop_rate", "drop_path")
"""In the names of what a model's configuration has it leave out at random in training."""
IN_WINDOWS = ("window_size",)
"""In the configuration of a model that cuts images up, as a Swin does."""
SIZES = (32, 16, 8, 4, 2)
ENOUGH = 0.9
"""Share of the most that packing can gain, at which more runs in a pack gain little and cost their memory."""
LEAST_GAIN = 1.15
"""Below which the runs are computed alone: nothing is then shared that could have been measured apart."""
COUNTED_ALONE = "one seed of each setting, for the sweep shows what they cost"
NONE_LIKE_IT = "no other has their base, data, batches and steps"
TOO_LARGE = "several of their size take as long as one after another, or do not fit in memory"
MEMORY_SHARE = 0.7
"""Of the memory that is free, what the packs of all workers may take together by the estimate."""


def unfit_base(spec: RunSpec, base: Any) -> str:
    """Why runs on this base are computed alone; empty where they need not be. Of a model without its method."""
    shares = [
        f"{name} = {value:g}"
        for name, value in (base.config.to_dict() if hasattr(base.config, "to_dict") else base.config).items()
        if any(word in name for word in DROPS) and isinstance(value, int | float) and value
    ]
    if shares:
        return f"{type(base).__name__} drops out by itself ({', '.join(shares)})"
    if drawn_modules(base):
        return "its files lack weights, which each run draws"
    for name in new_heads(base):
        if type(head := base.get_submodule(name)) is not nn.Linear:
            return f"its head {name} is a {type(head).__name__}, and no linear layer"
    if reads_images(base) and any(isinstance(getattr(base.config, key, None), int) for key in IN_WINDOWS):
        return f"{type(base).__name__} computes parts of an image apart from its row"
    if any("xpert" in type(module).__name__ for module in base.modules()):
        return f"{type(base).__name__} sends tokens to experts, apart from their rows"
    return ""


def rides(
    specs: Sequence[RunSpec], know: Callable[[RunSpec], tuple[Counts, str]], asked: Asked, device: torch.device
) -> tuple[dict[str, Ride], list[str]]:
    """By run, with whom it can be computed; and why some cannot, a sentence each. `know` tells a run's counts, and why
    its base is unfit."""
    found: dict[str, Ride] = {}
    notes: list[str] = []
    alike: dict[str, list[RunSpec]] = {}
    apart: Counter[str] = Counter()
    for spec in specs if asked.size != 1 else ():
        if (key := key_of(spec)) is None:
            apart[unshared(spec)] += 1
        elif spec.id in asked.alone:
            apart[COUNTED_ALONE] += 1
        else:
            alike.setdefault(key, []).append(spec)
    for key, runs in alike.items():
        if len(runs) < 2:
            apart[NONE_LIKE_IT] += 1
            continue
        try:
            known = [know(spec) for spec in runs]
        except InputError:
            continue  # said where the runs are counted
        if why := known[0][1]:
            notes.append(f"{runs[0].model}: not packed: {why}")
            continue
        spec, (counts, _) = max(zip(runs, known, strict=True), key=lambda each: each[1][0].num_trainable)
        size = asked.size or best_size(spec, counts, asked, device)
        if size == 1:
            apart[TOO_LARGE] += len(runs)
            continue
        found |= {
            spec.id: Ride(key=key, size=size, weight=counts.num_trainable)
            for spec, (counts, _) in zip(runs, known, strict=True)
        }
    if found:
        notes += [f"not packed: {number} {'run' if number == 1 else 'runs'}: {why}" for why, number in apart.items()]
    return found, notes


def best_size(spec: RunSpec, counts: Counts, asked: Asked, device: torch.device) -> int:
    """The fewest runs like this one in a pack that gain nearly as much as any number does, as far as memory goes."""
    alone = pack_seconds(spec, counts, device, 1, asked.gpu)
    gains = {size: alone / pack_seconds(spec, counts, device, size, asked.gpu) for size in SIZES}
    free = _free_bytes(device) * MEMORY_SHARE / asked.workers
    fitting = [size for size in SIZES if pack_bytes(spec, counts, device, size) < free]
    if not fitting or max(gains[size] for size in fitting) < LEAST_GAIN:
        return 1
    return min(size for size in fitting if gains[size] >= ENOUGH * max(gains[size] for size in fitting))


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0]) if torch.cuda.is_available() else math.inf
    return free_memory()
