import numpy as np
import pytest
import scipy.stats
import torch

from lorabench.linalg.decompose import spectrum_metrics
from lorabench.linalg.nulls import (
    _gaussian_r_factor,
    angle_chance,
    marchenko_pastur_quantiles,
    null_metrics,
    null_spectra,
    permutation_p_value,
    similarity_chance,
)


@pytest.mark.parametrize(("M", "N"), [(300, 300), (200, 500), (500, 200), (100, 1000)])
def test_dense_null_is_what_a_gaussian_matrix_gives(M, N):
    S = np.linalg.svd(np.random.default_rng(0).standard_normal((M, N)), compute_uv=False)
    drawn, null = spectrum_metrics(S / np.linalg.norm(S)), null_metrics(M, N, None)
    for key in ("rank_50", "rank_90", "rank_95", "rank_99"):
        assert null[key] == pytest.approx(drawn[key], abs=1.5)
    for key in ("effective_rank_entropy", "stable_rank", "participation_ratio", "nuclear_norm", "spectral_norm"):
        assert null[key] == pytest.approx(drawn[key], rel=0.04)


def test_dense_null_of_a_square_matrix_has_the_published_half():
    assert null_metrics(1000, 1000, None)["rank_90"] / 1000 == pytest.approx(0.51, abs=0.005)


@pytest.mark.parametrize(("M", "N"), [(400, 400), (50, 900)])
def test_marchenko_pastur_moments(M, N):
    """E x = 1, E x² = 1 + y."""
    x = marchenko_pastur_quantiles(M, N)
    assert x.mean() == pytest.approx(1, abs=2e-3)
    assert np.square(x).mean() == pytest.approx(1 + min(M, N) / max(M, N), rel=5e-3)
    assert (np.diff(x) <= 0).all()


@pytest.mark.parametrize(("M", "N", "r"), [(60, 40, 6), (30, 50, 20), (8, 30, 12)])
def test_factored_null_is_what_gaussian_factors_give(M, N, r):
    random = np.random.default_rng(1)
    direct = []
    for _ in range(300):
        S = np.linalg.svd(random.standard_normal((M, r)) @ random.standard_normal((r, N)), compute_uv=False)
        direct.append(S[: min(M, N, r)] / np.linalg.norm(S))
    direct = np.array(direct)
    error = direct.std(0) * (1 / 16 + 1 / 300) ** 0.5
    assert (np.abs(null_spectra(M, N, r).mean(0) - direct.mean(0)) < 4.5 * error).all()
    metrics = [spectrum_metrics(S)["effective_rank_entropy"] for S in direct]
    assert null_metrics(M, N, r)["effective_rank_entropy"] == pytest.approx(
        np.mean(metrics), abs=4.5 * np.std(metrics) / 4
    )


@pytest.mark.parametrize(("rows", "columns"), [(7, 4), (3, 5)])
def test_bartletts_factor_has_the_gram_matrix_of_a_gaussian(rows, columns):
    """E RᵀR = rows · I, and the diagonal of RᵀR is χ² with `rows` degrees of freedom."""
    random = np.random.default_rng(0)
    grams = np.array([R.T @ R for R in (_gaussian_r_factor(random, rows, columns) for _ in range(4000))])
    assert grams.mean(0) == pytest.approx(rows * np.eye(columns), abs=0.35)
    assert grams.var(0).diagonal() == pytest.approx(np.full(columns, 2.0 * rows), rel=0.15)


@pytest.mark.parametrize("d", [9, 30])
def test_chance_similarity_is_that_of_random_subspaces(d):
    random = np.random.default_rng(2)
    draws = np.array([np.linalg.qr(random.standard_normal((d, 6)))[0][:8] for _ in range(4000)])
    overlap = np.square(draws).cumsum(1).cumsum(2).swapaxes(1, 2)  # against the first axes
    phi = overlap / np.minimum(np.arange(1, 7)[:, None], np.arange(1, 9))
    mean, std = similarity_chance(6, 8, d)
    assert np.abs(mean - phi.mean(0)).max() < 4.5 * (std / 4000**0.5).max()
    assert std == pytest.approx(phi.std(0), rel=0.08)


def test_chance_similarity_of_the_whole_space_and_the_papers_figure():
    mean, std = similarity_chance(4, 4, 4)
    assert mean[3, 3] == 1 and std[3].max() == 0
    assert similarity_chance(8, 64, 768)[0][0, 63] == pytest.approx(0.083, abs=5e-4)


@pytest.mark.parametrize(("p", "q", "d"), [(2, 5, 20), (4, 4, 6), (3, 3, 3)])
def test_chance_angles_are_those_of_random_subspaces(p, q, d):
    random = np.random.default_rng(3)
    angles = []
    for _ in range(500):
        U, V = (np.linalg.qr(random.standard_normal((d, k)))[0] for k in (p, q))
        cosines = np.linalg.svd(U.T @ V, compute_uv=False)
        angles.append(np.arccos(np.clip(cosines, 0, 1)))
    angles = np.array(angles)
    mean, distance = angle_chance(p, q, d)
    assert mean == pytest.approx(angles.mean(0), abs=5 * angles.std() / 4 + 1e-6)
    assert distance == pytest.approx(np.linalg.norm(angles, axis=1).mean(), abs=0.15)


def orthonormal(random, d, k, outliers=0):
    """Columns of a random subspace; `outliers` coordinates of its own are 30 times as large as the others."""
    X = random.standard_normal((d, k))
    X[random.choice(d, outliers, replace=False)] *= 30
    return torch.from_numpy(np.linalg.qr(X)[0])


@pytest.mark.parametrize("outliers", [0, 2])
def test_p_values_are_uniform_where_nothing_is_shared(outliers):
    """Also where a few coordinates outweigh the others, which the variance of random subspaces knows nothing of."""
    random = np.random.default_rng(5)
    pairs = [(orthonormal(random, 40, 3, outliers), orthonormal(random, 40, 5, outliers)) for _ in range(400)]
    found = [permutation_p_value(U, V, draws=99, seed=seed) for seed, (U, V) in enumerate(pairs)]
    assert scipy.stats.kstest(found, "uniform").pvalue > 1e-3
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=4.5 * (0.05 * 0.95 / 400) ** 0.5)


def test_gaussian_chance_would_call_own_outliers_shared():
    """The reason for a permutation test: 1% of pairs should pass the 99% point of φ, far more do."""
    random = np.random.default_rng(6)
    pairs = [(orthonormal(random, 40, 3, 2), orthonormal(random, 40, 5, 2)) for _ in range(400)]
    mean, std = similarity_chance(3, 5, 40)
    above = [float((U.T @ V).square().sum() / 3) > mean[-1, -1] + 2.33 * std[-1, -1] for U, V in pairs]
    assert np.mean(above) > 0.05


def test_p_value_of_shared_and_of_whole_spaces():
    random = np.random.default_rng(7)
    U = orthonormal(random, 40, 3)
    assert permutation_p_value(U, U) == pytest.approx(1 / 200), "the smallest that 199 draws can give"
    assert permutation_p_value(U, orthonormal(random, 40, 40)) == 1, "any space lies in the whole one"
    assert permutation_p_value(U.float(), U.float(), seed=3) == permutation_p_value(U.float(), U.float(), seed=3)


def test_p_value_is_that_of_a_loop_over_permuted_rows():
    random = np.random.default_rng(8)
    U, V = orthonormal(random, 30, 2), orthonormal(random, 30, 4)
    V = torch.linalg.qr(V + 0.5 * torch.cat([U, U], 1))[0]
    draws = [((U.T @ V[torch.from_numpy(random.permutation(30))]) ** 2).sum() for _ in range(2000)]
    expected = np.mean([draw >= ((U.T @ V) ** 2).sum() for draw in draws])
    assert permutation_p_value(U, V, draws=2000) == pytest.approx(expected, abs=4.5 * (0.25 / 1000) ** 0.5)
