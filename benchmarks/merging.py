"""Speed and error of merges of ΔW itself beside the dense way: every ΔW formed, and decomposed whole.

8 adapters of rank 16 on one layer. The dense way is that of the methods' own code: `torch.linalg.svd` of each ΔW (TSV),
of their sum (Iso-C), of all of them side by side (KnOTS), whole vectors of entries (TIES, DARE). Both are timed in
float32 on the same factors. Errors are ‖difference‖ / ‖merge‖ to the dense way in float64, at `--exact-size`.

    python benchmarks/merging.py                  # 4096 x 4096: some ten minutes on two cores, nearly all of them dense
    python benchmarks/merging.py --size 512       # a look at whether all of it works
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

from lorabench.processes.machine import PATIENT_THREADS, available_cores

os.environ.update(PATIENT_THREADS)

import torch
from hardware import spread, write
from torch import Tensor

from lorabench.adapters.merging.bodies import Body
from lorabench.adapters.merging.task_vectors import merged_updates
from lorabench.linalg.joint import Pair

DENSITY = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1, help="of the dense way; lorabench's is the median of five")
    parser.add_argument("--exact-size", type=int, default=512)
    parser.add_argument("--by", default=",".join(DENSE_WAY))
    arguments = parser.parse_args()
    torch.set_num_threads(available_cores())
    pairs = factors(arguments.size, arguments.adapters, arguments.rank)
    small = factors(arguments.exact_size, arguments.adapters, arguments.rank)
    settings = {key: getattr(arguments, key) for key in ("size", "exact_size", "adapters", "rank", "rounds")}
    figures: dict[str, Any] = {}
    for by in arguments.by.split(","):
        figures[by] = {"relative_error": errors(by, small)} | race(by, pairs, arguments.rounds)
        print(by, json.dumps(figures[by]), flush=True)
        # After each: a dense way takes minutes.
        file = write("merging", "cpu", settings | {"density": DENSITY}, {"sections": figures})
    print(file)


def factors(d: int, count: int, r: int) -> list[Pair]:
    """Singular values over two decades, as trained factors have them."""
    g = torch.Generator().manual_seed(0)
    shapes = torch.logspace(0, -2, r)
    return [(torch.randn(d, r, generator=g) * shapes, torch.randn(r, d, generator=g) / d**0.5) for _ in range(count)]


def merged(by: str, pairs: list[Pair]) -> Pair:
    body = Body(by=by, weights=(1.0,) * len(pairs), density=DENSITY, seed=0)
    return next(merged_updates({"layer": pairs}, body))[1]


def errors(by: str, pairs: list[Pair]) -> dict[str, float] | None:
    """Of both ways; None for DARE, which draws other numbers in each."""
    if by == "delta_dare":
        return None
    exact = DENSE_WAY[by]([(B.double(), A.double()) for B, A in pairs])
    B, A = merged(by, pairs)
    found = {"lorabench": B.double() @ A.double(), "dense": DENSE_WAY[by](pairs).double()}
    return {name: float((W - exact).norm() / exact.norm()) for name, W in found.items()}


def race(by: str, pairs: list[Pair], rounds: int) -> dict[str, Any]:
    B, _ = merged(by, pairs)
    own = [seconds(lambda: merged(by, pairs)) for _ in range(5)]
    dense = [seconds(lambda: DENSE_WAY[by](pairs)) for _ in range(rounds)]
    median = spread(own)["median"]
    return {
        "rank": B.shape[1],
        "seconds": {"lorabench": spread(own), "dense": spread(dense)},
        "times_slower_than_lorabench": spread([taken / median for taken in dense]),
    }


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def formed(pairs: list[Pair]) -> list[Tensor]:
    return [B @ A for B, A in pairs]


def iso_c(pairs: list[Pair]) -> Tensor:
    U, S, Vh = torch.linalg.svd(sum(formed(pairs), torch.zeros(())), full_matrices=False)
    rank = sum(B.shape[1] for B, _ in pairs)
    return S[:rank].mean() * U[:, :rank] @ Vh[:rank]


def tsv(pairs: list[Pair]) -> Tensor:
    parts = [torch.linalg.svd(W, full_matrices=False) for W in formed(pairs)]
    r = pairs[0][0].shape[1]
    U, V = torch.cat([U[:, :r] for U, _, _ in parts], 1), torch.cat([Vh[:r] for _, _, Vh in parts])
    (X, _, Y), (Z, _, K) = (torch.linalg.svd(side, full_matrices=False) for side in (U, V))
    return X @ Y * torch.cat([S[:r] for _, S, _ in parts]) @ (Z @ K)


def knots_ties(pairs: list[Pair]) -> Tensor:
    U, S, Vh = torch.linalg.svd(torch.cat(formed(pairs), 1), full_matrices=False)
    rank = sum(B.shape[1] for B, _ in pairs)
    rows = (S[:rank, None] * Vh[:rank]).chunk(len(pairs), 1)
    return U[:, :rank] @ elected(torch.stack([part.flatten() for part in rows])).view(rank, -1)


def delta_ties(pairs: list[Pair]) -> Tensor:
    return elected(torch.stack([W.flatten() for W in formed(pairs)])).view(len(pairs[0][0]), -1)


def elected(vectors: Tensor) -> Tensor:
    """TIES of vectors (T, entries)."""
    count = int(DENSITY * vectors.shape[1])
    bounds = vectors.abs().kthvalue(vectors.shape[1] - count + 1, dim=1, keepdim=True).values
    kept = torch.where(vectors.abs() >= bounds, vectors, 0)
    agrees = kept.sign() == kept.sum(0).sign()
    agrees &= kept != 0
    return (kept * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def delta_dare(pairs: list[Pair]) -> Tensor:
    return sum((W * (torch.rand_like(W) < DENSITY) / DENSITY for W in formed(pairs)), torch.zeros(()))


def mean(pairs: list[Pair]) -> Tensor:
    return sum(formed(pairs), torch.zeros(())) / len(pairs)


DENSE_WAY = {
    "mean": mean,
    "iso_c": iso_c,
    "tsv": tsv,
    "knots_ties": knots_ties,
    "delta_ties": delta_ties,
    "delta_dare": delta_dare,
}


if __name__ == "__main__":
    main()
