"""The permutation test and its correction: against loops, where the hypothesis holds, and where it does not."""

import numpy as np
import pytest
import torch

from lorabench.linalg import permutation
from lorabench.linalg.nulls import similarity_chance
from lorabench.linalg.permutation import EXCEEDANCES, FEWEST, MOST, corrected, most_draws, permutation_p_value


def orthonormal(random, d, k, outliers=0, scales=1.0):
    """Columns of a random subspace; `outliers` coordinates of its own are 30 times as large as the others."""
    X = random.standard_normal((d, k)) * np.reshape(scales, (-1, 1))
    X[random.choice(d, outliers, replace=False)] *= 30
    return torch.from_numpy(np.linalg.qr(X)[0])


@pytest.mark.parametrize("outliers", [0, 2])
def test_p_values_are_uniform_where_nothing_is_shared(outliers):
    """At what they can be; also where a few coordinates outweigh the others, which the variance of random subspaces
    knows nothing of."""
    random = np.random.default_rng(5)
    pairs = [(orthonormal(random, 40, 3, outliers), orthonormal(random, 40, 5, outliers)) for _ in range(400)]
    found = np.array([permutation_p_value(U, V, most=199, seed=seed) for seed, (U, V) in enumerate(pairs)])
    for p in (0.01, 0.05, EXCEEDANCES / 199, EXCEEDANCES / 100, EXCEEDANCES / 50, EXCEEDANCES / 25):
        assert np.mean(found <= p + 1e-9) == pytest.approx(p, abs=4 * (p * (1 - p) / 400) ** 0.5)


def test_gaussian_chance_would_call_own_outliers_shared():
    """The reason for a permutation test: 1% of pairs should pass the 99% point of φ, far more do."""
    random = np.random.default_rng(6)
    pairs = [(orthonormal(random, 40, 3, 2), orthonormal(random, 40, 5, 2)) for _ in range(400)]
    mean, std = similarity_chance(3, 5, 40)
    above = [float((U.T @ V).square().sum() / 3) > mean[-1, -1] + 2.33 * std[-1, -1] for U, V in pairs]
    assert np.mean(above) > 0.05


def test_equal_variances_of_the_coordinates_are_enough_to_reject():
    """The caveat: independent directions with the same scales, of which the documentation warns; none with others."""
    random = np.random.default_rng(9)
    scales = np.exp(random.standard_normal(60))
    for second, rejects in ((scales, True), (scales[::-1], False)):
        pairs = [(orthonormal(random, 60, 4, 0, scales), orthonormal(random, 60, 4, 0, second)) for _ in range(40)]
        share = np.mean([permutation_p_value(U, V, most=199) <= 0.05 for U, V in pairs])
        assert (share > 0.9) if rejects else (share < 0.25)


def test_p_value_of_shared_and_of_whole_spaces():
    random = np.random.default_rng(7)
    U = orthonormal(random, 40, 3)
    assert permutation_p_value(U, U) == 1 / (MOST + 1), "the smallest there is, of a small matrix"
    assert permutation_p_value(U, orthonormal(random, 40, 40)) == 1, "any space lies in the whole one"
    assert permutation_p_value(U.float(), U.float(), seed=3) == permutation_p_value(U.float(), U.float(), seed=3)
    assert permutation_p_value(torch.ones(1, 1), torch.ones(1, 1)) == 1


def test_large_matrices_have_fewer_draws():
    assert most_draws(128, 1) == MOST and most_draws(4096, 64) == FEWEST and FEWEST < most_draws(128, 16) < MOST


@pytest.mark.parametrize("shared", [0.0, 0.7, 3.0])
@pytest.mark.parametrize(("p", "q"), [(2, 4), (5, 3)])
def test_p_value_is_that_of_a_loop_that_stops_at_20(shared, p, q):
    """Besag and Clifford 1991: 20 / l where the 20th is draw l, else (1 + number) / (most + 1)."""
    random = np.random.default_rng(8)
    U, V = orthonormal(random, 30, p), orthonormal(random, 30, q)
    V[:, 0] += shared * U[:, 0]
    V = torch.linalg.qr(V)[0]
    expected, count, most = None, 0, 700
    orders = np.concatenate([*permutation._permutations(30, most, 0)])
    assert len({*map(tuple, orders)}) == most and (np.sort(orders) == np.arange(30)).all()
    fixed, moved = (U, V) if p >= q else (V, U)
    for number, order in enumerate(orders, 1):
        count += bool(((fixed.T @ moved[order]) ** 2).sum() >= (U.T @ V).square().sum() - 1e-9)
        if count == EXCEEDANCES:
            expected = EXCEEDANCES / number
            break
    assert permutation_p_value(U, V, most=most) == (expected or (1 + count) / (most + 1))


def test_more_draws_where_p_is_small():
    """The p-value of a fixed 20,000 draws is met to the relative error that 20 exceedances leave, here 4 of it."""
    random = np.random.default_rng(11)
    U, V = orthonormal(random, 30, 1), orthonormal(random, 30, 1)
    V = torch.linalg.qr(V + 0.7 * U)[0]
    orders = random.permuted(np.tile(np.arange(30), (20_000, 1)), axis=1)
    exact = np.mean(np.square(V.numpy()[orders, 0] @ U.numpy()[:, 0]) >= float((U.T @ V) ** 2))
    assert 0.002 < exact < 0.02, "a fixed 199 draws would have counted a few"
    assert permutation_p_value(U, V) == pytest.approx(exact, rel=4 / EXCEEDANCES**0.5)


def test_the_correction_is_benjamini_and_hochbergs():
    """Their definition: at each level q the k smallest are rejected, of the largest k with p_(k) <= k q / m."""
    p = np.random.default_rng(0).uniform(size=30) ** 3
    found, order = corrected(p), np.sort(p)
    for q in (0.01, 0.05, 0.2, 0.6):
        passing = [k for k in range(1, 31) if order[k - 1] <= k * q / 30]
        assert (found <= q).sum() == max(passing, default=0)
        assert (found <= q).tolist() == (p <= (order[max(passing) - 1] if passing else -1)).tolist()
    assert (found >= p).all() and corrected([0.001] * 50) == pytest.approx([0.001] * 50)
    assert corrected([0.03]) == [0.03] and len(corrected([])) == 0
