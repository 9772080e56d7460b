"""Time of the analyses of ΔW on W0, whose SVD is cached, beside the dense way: forming both weights, and their SVDs.

python benchmarks/weights.py               # 4096 x 4096: some minutes on two cores
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
from lorabench.analyses.cosines import Cosines
from lorabench.analyses.off_principal import OffPrincipal
from lorabench.analyses.profile import Profile, directions, responses
from lorabench.analyses.sparsity import Sparsity
from lorabench.linalg.decompose import thin_svd
from lorabench.spec.analysis import Analysis
from lorabench.updates.base import BaseLayer, Tuned, decompose
from lorabench.updates.layer import LayerSVD
from lorabench.updates.update import Update

ANALYSES = {
    "profile": Profile(),
    "off_principal": OffPrincipal(),
    "sparsity": Sparsity(),
    "cosines": Cosines(),
    "accumulation": Accumulation(),
}
TASKS = 3
"""Of a sequence, after each of which `accumulation` looks at ΔW: a quarter, half and all of it."""


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
    cached = time.perf_counter() - begun
    sections: dict[str, Any] = {"base": {"seconds_to_cache": cached}}
    for kind, update in {"factors": Update(parameter="w", B=B, A=A), "dense": Update(parameter="w", B=B @ A)}.items():
        svd = thin_svd(update.B, update.A, keep=64)
        layer = LayerSVD(parameter="w", svd=svd, update=update)
        for name, analysis in ANALYSES.items():
            call = partial(computed, analysis, layer, base)
            times = [seconds(call) for _ in range(arguments.rounds)]
            sections[f"{name}_{kind}"] = {"seconds": spread([wall for wall, _ in times])}
            sections[f"{name}_{kind}"]["cpu_seconds"] = spread([used for _, used in times])
    errors, dense = dense_way(base, B @ A, Tuned(layer=layer, base=base))
    sections["dense_way"] = {"seconds": dense, "largest_error_of_the_profile": errors}
    settings = {"size": arguments.size, "rank": arguments.rank, "rounds": arguments.rounds}
    print(json.dumps(sections, indent=1))
    print(write("weights", "cpu", settings, {"sections": sections}))


def computed(analysis: Analysis, layer: LayerSVD, base: BaseLayer) -> list[dict[str, Any]]:
    """With nothing kept from another analysis of the same layer."""
    if analysis.needs != "base_trajectory":
        return analysis.compute(Tuned(layer=layer, base=base))
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


def dense_way(base: BaseLayer, delta: Tensor, tuned: Tuned) -> tuple[dict[str, float], dict[str, float]]:
    """SVDs of W0 and of W (of a sequence one a task), and ΔW along every direction, as the papers' scripts have it: the
    largest error of `profile` against the same in float64, as a share of the root mean square, and the seconds.

    Along the last few directions, whose singular values are next to nothing, right vectors are told from rounding."""
    begun = time.perf_counter()
    U, _, Vh = torch.linalg.svd(base.weight, full_matrices=False)
    first = time.perf_counter() - begun
    torch.linalg.svd(base.weight + delta, full_matrices=False)
    second = time.perf_counter() - begun - first
    torch.linalg.vector_norm(delta @ Vh.mT, dim=0)
    ((U.mT @ (base.weight + delta)) @ Vh.mT).diagonal()
    whole = time.perf_counter() - begun
    *_, exact = torch.linalg.svd(base.weight.double(), full_matrices=False)  # of close ones float32 mixes the vectors
    response = torch.linalg.vector_norm(delta.double() @ exact.mT, dim=0)
    _, _, chosen = directions(len(base.svd.S))
    errors: dict[str, float] = {"of_99_percent": 0.0, "of_the_smallest": 0.0}
    for each in chosen:
        found = abs(responses(tuned, each)["input"] - response[torch.from_numpy(each)].numpy())
        for place, error in zip(each, found / float(response.square().mean().sqrt()), strict=True):
            name = "of_99_percent" if place < 0.99 * len(response) else "of_the_smallest"
            errors[name] = max(errors[name], float(error))
    times = {"svd_of_w0": first, "svd_of_w": second, "along_w0s_directions": whole - first - second}
    return errors, times


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
