"""Rank correlation over settings, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorabench.report.aggregate import CONFIDENCE

FEWEST = 5
"""Settings for a rank correlation: of four even the most extreme order has p = 1/12."""


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Spearman's ρ in [-1, 1] over n pairs, its 95% interval and its p; by chance ρ is 0.

    No interval where all ranks agree, or all are reversed.
    """

    rho: float
    low: float | None
    high: float | None
    p: float
    n: int

    def __str__(self) -> str:
        """`ρ = 0.83 [0.42, 0.96], n = 10`."""
        ends = "" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"ρ = {self.rho:.2f}{ends}, n = {self.n}".replace("-", "−")


def spearman(xs: Sequence[float], ys: Sequence[float]) -> Correlation | None:
    """None of fewer than FEWEST pairs, or where one side is always the same.

    The interval is that of Fisher's z = artanh ρ with the variance (1 + ρ²/2) / (n - 3) of Bonett and Wright 2000
    (Psychometrika 65, equation 4).
    """
    from scipy import stats

    if len(xs) < FEWEST or len({*xs}) == 1 or len({*ys}) == 1:
        return None
    rho, p = map(float, stats.spearmanr(xs, ys))
    if abs(rho) > 1 - 1e-12:
        return Correlation(rho=rho, low=None, high=None, p=p, n=len(xs))
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt((1 + rho**2 / 2) / (len(xs) - 3))
    low, high = (math.tanh(math.atanh(rho) + sign * half) for sign in (-1, 1))
    return Correlation(rho=rho, low=low, high=high, p=p, n=len(xs))
