"""What is evaluated where adapters are merged: the base, each adapter, and each way of merging them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorabench.config.decode import InputError
from lorabench.config.plugins import unknown
from lorabench.config.quote import clip

FACTOR_WISE = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Combinations of A and of B apart."""
OF_PEFT = (*FACTOR_WISE, "cat", "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
"""PEFT's `combination_type`; `lorabench merge --help` says what each computes."""
OF_UPDATES = ("mean", "delta_ties", "delta_dare", "iso_c", "tsv", "knots_ties")
"""Merges of the updates ΔW themselves, as their papers define them (`task_vectors`)."""
COMBINATIONS = (*OF_PEFT, *OF_UPDATES)
DENSE = ("delta_ties", "delta_dare")
"""Those of full rank."""
WITHOUT_DENSITY = ("linear", "cat", "svd", "mean", "iso_c", "tsv")
RANDOM = ("dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd", "delta_dare")
BASE, ADAPTER, MERGED = "base", "adapter", "merged"


@dataclass(frozen=True, kw_only=True)
class Body:
    """What is evaluated: the base (`by = "base"`), one run's adapter (`"adapter"`), or a merge of all of them.

    Only what `by` depends on is set, so that equal bodies have equal ids.
    """

    by: str
    run_id: str | None = None
    weights: tuple[float, ...] | None = None
    density: float | None = None
    rank: int | None = None
    seed: int | None = None

    @property
    def label(self) -> str:
        """`ties (density 0.5, A and B apart)`; the seed apart."""
        details = [f"{key} {getattr(self, key):g}" for key in ("density", "rank") if getattr(self, key) is not None]
        if self.weights and len(set(self.weights)) > 1:
            details.insert(0, "weights " + ":".join(f"{weight:g}" for weight in self.weights))
        if self.by in FACTOR_WISE:
            details.append("A and B apart")
        name = self.run_id or self.by
        return f"{name} ({', '.join(details)})" if details else name


def usual(ranks: Sequence[Mapping[str, int]]) -> list[str]:
    """The merges of adapters with these ranks, by layer, that are tried where none is asked for."""
    if all(each == ranks[0] for each in ranks):
        return ["linear", "svd", "ties", "dare_linear", "dare_ties"]
    return ["cat", "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd"]


def bodies(
    run_ids: Sequence[str], by: Sequence[str], weights: Sequence[float], density: float, rank: int | None,
    seeds: Sequence[int],
) -> list[Body]:  # fmt: skip
    """The base, each adapter, and each merge (DARE: one a seed). InputError for what no merge can be made of."""
    problems = [f"--by {clip(name)}: {unknown('combination', name, list(COMBINATIONS))}"
                for name in by if name not in COMBINATIONS]  # fmt: skip
    if len(set(run_ids)) < 2 or len(set(run_ids)) < len(run_ids):
        problems.append(f"RUN = {clip(' '.join(run_ids))}: needs at least two runs, each once")
    if len(weights) != len(run_ids):
        problems.append(f"--weights {clip(','.join(map(str, weights)))}: must be {len(run_ids)}, one a run")
    elif "mean" in by and not sum(weights):
        problems.append(f"--weights {','.join(f'{weight:g}' for weight in weights)}: sum to 0, and have no mean")
    if not 0 < density <= 1:
        problems.append(f"--density {density:g}: must be above 0 and at most 1")
    if problems:
        raise InputError(problems)
    merges = [
        Body(
            by=name,
            weights=tuple(weights),
            density=None if name in WITHOUT_DENSITY else density,
            rank=rank if name.endswith("svd") or name in OF_UPDATES else None,
            seed=seed if name in RANDOM else None,
        )
        for name in by
        for seed in (seeds if name in RANDOM else seeds[:1])
    ]
    return [Body(by=BASE), *(Body(by=ADAPTER, run_id=run_id) for run_id in run_ids), *merges]
