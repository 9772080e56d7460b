"""Differences over seeds beside scipy's tests, closed forms, and simulated sweeps with known answers."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy import stats

from lorabench.report.differences import Estimate, difference, holm, mean, ratio, seeds_needed


def seeds(values: list[float], first: int = 0) -> dict[int, float]:
    return dict(enumerate(values, first))


A, B = [2.31, 2.44, 2.28, 2.52], [2.20, 2.41, 2.19, 2.38]


def test_shared_seeds_are_paired_as_scipy_pairs_them() -> None:
    found, wanted = difference(seeds(A), seeds(B)), stats.ttest_rel(A, B)
    low, high = wanted.confidence_interval(0.95)
    assert found.is_paired and found.n == 4
    assert [found.value, found.low, found.high, found.p] == pytest.approx(
        [np.mean(A) - np.mean(B), low, high, wanted.pvalue]
    )


def test_other_seeds_are_welchs() -> None:
    found, wanted = difference(seeds(A), seeds(B[:3], 10)), stats.ttest_ind(A, B[:3], equal_var=False)
    low, high = wanted.confidence_interval(0.95)
    assert not found.is_paired and found.n == 3
    assert [found.value, found.low, found.high, found.p, found.freedom] == pytest.approx(
        [np.mean(A) - np.mean(B[:3]), low, high, wanted.pvalue, wanted.df]
    )


def test_only_the_seeds_that_both_have_are_pairs() -> None:
    assert difference(seeds(A), seeds(B[:2])) == difference(seeds(A[:2]), seeds(B[:2]))
    assert not difference(seeds(A), seeds([1.0, 2.0], 3)).is_paired  # one seed alone is shared


def test_a_ratio_is_the_geometric_mean_of_the_pairs_and_turns_over() -> None:
    found, back = ratio(seeds(A), seeds(B)), ratio(seeds(B), seeds(A))
    assert found.value == pytest.approx(stats.gmean(np.array(A) / np.array(B)))
    assert found.low is not None and back.high is not None
    assert [found.value * back.value, found.low * back.high] == pytest.approx([1, 1])
    assert found.p == pytest.approx(stats.ttest_rel(np.log(A), np.log(B)).pvalue)


def test_one_mean_has_the_interval_of_all_tables() -> None:
    from lorabench.report.aggregate import interval

    found, (center, half) = mean(seeds(A)), interval(A)
    assert half is not None and found.low is not None and found.high is not None
    assert [found.value, found.low, found.high] == pytest.approx([center, center - half, center + half])


def test_too_few_seeds_have_no_interval_and_equal_ones_a_narrow_one() -> None:
    assert mean({0: 2.0}) == Estimate(value=2.0, n=1)
    assert difference({0: 2.0}, {0: 1.0}) == Estimate(value=1.0, n=1)
    same = difference(seeds([2.0, 2.0 + 1e-15]), seeds([1.0, 1.0]))
    assert (same.low, same.high, same.p) == (same.value, same.value, None)
    assert difference(seeds([0.1 + 0.2] * 3), seeds([0.3] * 3)).p == 1.0
    assert difference(seeds([5.0] * 3), seeds([4.0] * 3, 10)).p is None  # of accuracies, which come in steps, by chance


def test_holm_is_that_of_the_paper() -> None:
    """Holm 1979, section 4: three tests of which the smallest is taken times three, the next times two."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize("comparisons", [1, 10])
def test_so_many_seeds_would_be_needed_and_one_less_would_not_do(comparisons: int) -> None:
    found = difference(seeds(A), seeds(B))
    n = seeds_needed(found, 0.05, comparisons)
    assert n is not None and found.error is not None
    spread = found.error * 2
    half = [stats.t.ppf(1 - 0.025 / comparisons, k - 1) * spread / math.sqrt(k) for k in (n - 1, n)]
    assert half[1] < 0.05 <= half[0]


def test_what_no_number_of_seeds_tells() -> None:
    found = difference(seeds(A), seeds(B))
    assert seeds_needed(found, 0.0) is None and seeds_needed(found, 1e-6) is None
    assert seeds_needed(mean({0: 1.0}), 1.0) is None


@pytest.mark.parametrize("is_shared", [True, False])
def test_without_a_difference_one_in_twenty_seems_to_have_one(is_shared: bool) -> None:
    """2,000 pairs of like settings: the share that is found to differ is .05, within four standard errors, or less."""
    draw, found = random.Random(3), 0
    for _ in range(2000):
        own = [draw.gauss(0, 1) for _ in range(6)]  # of the seeds
        first, second = ([own[k] + draw.gauss(0, 0.3) for k in range(4)] for _ in range(2))
        if not is_shared:
            second = [draw.gauss(0, 1.04) for _ in range(4)]
        found += (difference(seeds(first), seeds(second, 0 if is_shared else 9)).p or 0.0) < 0.05
    assert found / 2000 < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 2000)
    assert found / 2000 > 0.02
