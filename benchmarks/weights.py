"""Time of the analyses of ΔW on W0, whose SVD is cached, beside the dense way: forming W0 + ΔW, and its SVD.

Both have W0's SVD at hand, and take turns round by round. lorabench's time is that of chance too, as many draws of a
random ΔW as stand in `Tuned.nulls`; the dense way's is of ΔW alone.

python benchmarks/weights.py               # 4096 x 4096: ten minutes on two cores
python benchmarks/weights.py --size 512    # a look at whether all of it works
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from lorabench.processes.machine import PATIENT_THREADS, available_cores

os.environ.update(PATIENT_THREADS)

import torch
from hardware import spread, write
from torch import Tensor

from lorabench.analyses.accumulation import Accumulation
from lorabench.analyses.alignment import Alignment
from lorabench.analyses.cosines import Cosines
from lorabench.analyses.intruders import Intruders
from lorabench.analyses.off_principal import OffPrincipal
from lorabench.analyses.profile import Profile, directions, responses
from lorabench.analyses.shared_changes import SharedChanges
from lorabench.analyses.sparsity import Sparsity
from lorabench.analyses.survival import Survival
from lorabench.linalg.decompose import thin_svd
from lorabench.spec.analysis import Analysis
from lorabench.updates.base import BaseLayer, Tuned, decompose
from lorabench.updates.layer import LayerSVD
from lorabench.updates.update import Update

TASKS = 3
"""Of a sequence, after each of which `accumulation` looks at ΔW: a quarter, half and all of it."""
ANALYSES: dict[str, tuple[Analysis, dict[str, int]]] = {
    "alignment": (Alignment(), {}),
    "profile": (Profile(), {"along_w0s_directions": 1}),
    "off_principal": (OffPrincipal(), {"svd_of_w": 1}),
    "survival": (Survival(), {"svd_of_w": 1}),
    "cosines": (Cosines(), {"svd_of_w": 1}),
    "intruders": (Intruders(), {"svd_of_w": 1}),
    "accumulation": (Accumulation(), {"svd_of_w": TASKS}),
    "sparsity": (Sparsity(), {"masks": 1}),
    "shared_changes": (SharedChanges(), {"masks": 2}),
}
"""Name -> the analysis, and how often the dense way needs each of its parts. `alignment` is what a script would do."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(available_cores())
    W, (B, A) = base_weight(arguments.size), factors(arguments.size, arguments.rank)
    begun = time.perf_counter()
    base = decompose(W)
    sections: dict[str, Any] = {"base": {"seconds_to_cache": time.perf_counter() - begun}}
    layers = {
        kind: LayerSVD(parameter="w", svd=thin_svd(update.B, update.A, keep=64), update=update)
        for kind, update in {
            "factors": Update(parameter="w", B=B, A=A),
            "dense": Update(parameter="w", B=B @ A),
        }.items()
    }
    right = torch.linalg.svd(W, full_matrices=False).Vh.mT
    dense = {
        "svd_of_w": lambda: torch.linalg.svd(W + B @ A, full_matrices=False),
        "along_w0s_directions": lambda: along(base, B @ A, right),
        "masks": lambda: masks(base, B @ A),
    }
    calls = dense | {
        f"{name}_{kind}": partial(computed, analysis, layer, base)
        for kind, layer in layers.items()
        for name, (analysis, _) in ANALYSES.items()
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(arguments.rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    used = {name: [each for _, each in found] for name, found in times.items()}  # which other processes change less
    for name, found in times.items():
        sections[name] = {"seconds": spread([each for each, _ in found]), "cpu_seconds": spread(used[name])}
        needed = ANALYSES[name.rpartition("_")[0]][1] if name not in dense else {}
        if needed:
            sums = [sum(count * used[part][n] for part, count in needed.items()) for n in range(arguments.rounds)]
            ratios = [whole / own for whole, own in zip(sums, used[name], strict=True)]
            sections[name]["times_slower_the_dense_way"] = spread(ratios)
    sections["largest_error_of_the_profile"] = error_of_profile(base, B @ A, Tuned(layer=layers["dense"], base=base))
    settings = {"size": arguments.size, "rank": arguments.rank, "rounds": arguments.rounds}
    print(json.dumps(sections, indent=1))
    print(write("weights", "cpu", settings, {"sections": sections}))


def computed(analysis: Analysis, layer: LayerSVD, base: BaseLayer) -> list[dict[str, Any]]:
    """With nothing kept from another analysis of the same layer."""
    if analysis.needs != "base_trajectory":
        return analysis.compute(*(Tuned(layer=layer, base=base) for _ in range(1 + analysis.is_of_pairs())))
    return analysis.compute(*(Tuned(layer=after(layer, task), base=base) for task in range(1, TASKS + 1)))


def after(layer: LayerSVD, task: int) -> LayerSVD:
    """The same directions, as far as they have come."""
    part, svd, update = 2.0 ** (task - TASKS), layer.svd, layer.update
    assert update is not None
    smaller = replace(update, B=part * update.B)
    return replace(layer, svd=replace(svd, S=part * svd.S), update=smaller, step=task)


def seconds(call: Callable[[], Any]) -> tuple[float, float]:
    """Of the wall's clock, and of the processor's."""
    wall, used = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - used


def along(base: BaseLayer, delta: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """‖ΔW v_i‖ and u_iᵀ (W0 + ΔW) v_i of all of W0's directions, as the papers' scripts have it."""
    diagonal = ((base.left.mT @ (base.weight + delta)) @ right).diagonal()
    return torch.linalg.vector_norm(delta @ right, dim=0), diagonal


def masks(base: BaseLayer, delta: Tensor) -> list[float]:
    """The shares of `sparsity`, entry by entry: what changes in bfloat16, is largest, principal or smallest."""
    W, k = base.weight, min(len(base.svd.S) // 16, base.svd.U.shape[1])
    before, after = W.bfloat16().float(), (W + delta).bfloat16().float()
    changed = (after - before).abs() > 1e-3 * torch.maximum(before.abs(), after.abs())
    low_rank = (base.svd.U[:, :k] * base.svd.S[:k].float()) @ base.svd.Vh[:k]
    marks = [largest(low_rank.abs()), largest(-W.abs())]
    sets = [changed, largest(delta.abs())]
    return [float((each & mark).sum() / each.sum().clamp_min(1)) for each in sets for mark in marks]


def largest(values: Tensor) -> Tensor:
    """The 30% largest entries."""
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[values.flatten().topk(round(0.3 * values.numel())).indices] = True
    return mask.view_as(values)


def error_of_profile(base: BaseLayer, delta: Tensor, tuned: Tuned) -> dict[str, float]:
    """The largest error of `profile` against the same in float64, as a share of the root mean square.

    Along the last few directions, whose singular values are next to nothing, right vectors are told from rounding."""
    *_, exact = torch.linalg.svd(base.weight.double(), full_matrices=False)  # of close ones float32 mixes the vectors
    response = torch.linalg.vector_norm(delta.double() @ exact.mT, dim=0)
    _, _, chosen = directions(len(base.svd.S))
    errors: dict[str, float] = {"of_99_percent": 0.0, "of_the_smallest": 0.0}
    for each in chosen:
        found = abs(responses(tuned, each)["input"] - response[torch.from_numpy(each)].numpy())
        for place, error in zip(each, found / float(response.square().mean().sqrt()), strict=True):
            name = "of_99_percent" if place < 0.99 * len(response) else "of_the_smallest"
            errors[name] = max(errors[name], float(error))
    return errors


def base_weight(d: int) -> Tensor:
    """A weight with a decaying head on a Gaussian bulk."""
    g = torch.Generator().manual_seed(1)
    count = d // 8
    U, V = (torch.linalg.qr(torch.randn(d, count, generator=g)).Q for _ in range(2))
    return (U * (8 * torch.arange(1, count + 1) ** -0.6)) @ V.mT + torch.randn(d, d, generator=g) / d**0.5


def factors(d: int, r: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(d, r, generator=g) * torch.logspace(0, -2, r) / d**0.5, torch.randn(r, d, generator=g) / d**0.5


if __name__ == "__main__":
    main()
