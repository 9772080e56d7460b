"""Spearman's ρ and its interval: against SciPy, by coverage, and where there is none."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lorabench.report.correlation import FEWEST, spearman


def test_it_is_scipys_and_its_interval_covers_the_true_one_95_times_in_100() -> None:
    rng, n, pearson = np.random.default_rng(0), 14, 0.7
    truth = 6 / np.pi * np.arcsin(pearson / 2)  # Spearman's ρ of a bivariate normal distribution
    found, hits = 1000, 0
    for _ in range(found):
        x, y = rng.multivariate_normal([0, 0], [[1, pearson], [pearson, 1]], n).T
        each = spearman(x, y)
        hits += each.low <= truth <= each.high
    assert (each.rho, each.p) == pytest.approx(tuple(stats.spearmanr(x, y)))
    assert 0.93 < hits / found < 0.98


def test_extremes() -> None:
    up = list(range(FEWEST))
    assert spearman(up[1:], up[1:]) is None and spearman([1.0] * FEWEST, up) is None
    rising, falling = spearman(up, up), spearman(up, up[::-1])
    assert (rising.rho, falling.rho) == (pytest.approx(1), pytest.approx(-1)) and rising.low is falling.low is None
    assert str(falling) == "ρ = −1.00, n = 5"
    assert str(spearman([1, 2, 3, 4, 5, 6], [2, 1, 3, 4, 6, 5])).startswith("ρ = 0.89 [")
