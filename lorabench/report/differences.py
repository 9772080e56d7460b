"""Two settings beside each other, over seeds: their difference or ratio with an interval, whether chance would give it,
and how many seeds it would take to tell.

Student's t throughout: of the pairs where two or more seeds are shared, for then what a seed gives to both drops out;
else Welch's, for spreads that differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, variance

import numpy as np
from scipy import stats

from lorabench.report.aggregate import CONFIDENCE

ROUNDING = 1e-12
"""A spread of this share of the mean is rounding, and none."""
MOST_SEEDS = 1000
"""More seeds than that are as good as never."""
Seeds = Mapping[int, float]
"""Seed -> value."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number over seeds, and its two-sided 95% interval: None where there are too few seeds for one."""

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    """Of a difference at least as large by chance, where there is none; of a ratio that is another than 1. None where
    it cannot be known: of too few seeds, or where a few seeds that are alike have no spread to judge by."""
    n: int
    """Seeds behind it: pairs, or of two sides the smaller number."""
    is_paired: bool = False
    error: float | None = None
    """Standard error; of a ratio that of its logarithm."""
    freedom: float | None = None
    """Degrees of freedom of Student's t."""


def mean(values: Seeds) -> Estimate:
    """The mean of one setting."""
    return _paired([*values.values()], _largest(values), is_paired=False)


def difference(first: Seeds, second: Seeds) -> Estimate:
    """`first - second`; of the seeds that both have, where these are two or more."""
    shared = sorted(first.keys() & second.keys())
    if len(shared) > 1:
        return _paired([first[seed] - second[seed] for seed in shared], _largest(first, second), is_paired=True)
    return _welch([*first.values()], [*second.values()], _largest(first, second))


def ratio(first: Seeds, second: Seeds) -> Estimate:
    """`first / second`, both positive: the geometric mean of the ratios, by the difference of logarithms."""
    found = difference(
        {seed: math.log(value) for seed, value in first.items()},
        {seed: math.log(value) for seed, value in second.items()},
    )
    low, high = (None if end is None else math.exp(end) for end in (found.low, found.high))
    return replace(found, value=math.exp(found.value), low=low, high=high)


def holm(values: Sequence[float]) -> list[float]:
    """p-values that allow for how many there are (Holm 1979): below α, one false finding in all is as probable."""
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted, highest = [0.0] * len(values), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - place) * values[index]))
        adjusted[index] = highest
    return adjusted


def seeds_needed(estimate: Estimate, distance: float, comparisons: int = 1) -> int | None:
    """How many seeds would make the interval narrower than `distance` to either side, the spread being what it is.

    Of one in so many `comparisons`, by Bonferroni. None where so many are out of reach, or the spread is not known.
    """
    if not estimate.error or not estimate.freedom or distance <= 0:
        return None
    spread, level = estimate.error * math.sqrt(estimate.n), 1 - (1 - CONFIDENCE) / (2 * comparisons)
    n = np.arange(2, MOST_SEEDS + 1)
    halves = stats.t.ppf(level, estimate.freedom * (n - 1) / (estimate.n - 1)) * spread / np.sqrt(n)
    enough = n[halves < distance]
    return int(enough[0]) if len(enough) else None


def _largest(*sides: Seeds) -> float:
    return max(abs(value) for side in sides for value in side.values())


def _paired(values: list[float], largest: float, is_paired: bool) -> Estimate:
    center, n = fmean(values), len(values)
    error = math.sqrt(variance(values) / n) if n > 1 else None
    return _estimate(center, error, n - 1, n, largest, is_paired)


def _welch(first: list[float], second: list[float], largest: float) -> Estimate:
    center, n = fmean(first) - fmean(second), min(len(first), len(second))
    if n < 2:
        return Estimate(value=center, n=n)
    parts = [variance(values) / len(values) for values in (first, second)]
    error = math.sqrt(sum(parts))
    divisor = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True))
    freedom = sum(parts) ** 2 / divisor if divisor else float(len(first) + len(second) - 2)
    return _estimate(center, error, freedom, n, largest)


def _estimate(
    center: float, error: float | None, freedom: float, n: int, largest: float, is_paired: bool = False
) -> Estimate:
    """`largest`: of the values behind it, whose rounding is no spread."""
    if error is None:
        return Estimate(value=center, n=n)
    if error <= ROUNDING * largest:
        p = 1.0 if abs(center) <= ROUNDING * largest else None
        return Estimate(value=center, low=center, high=center, p=p, n=n, is_paired=is_paired, error=0.0)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return Estimate(
        value=center, low=center - half, high=center + half, p=float(2 * stats.t.sf(abs(center) / error, freedom)),
        n=n, is_paired=is_paired, error=error, freedom=freedom,
    )  # fmt: skip
