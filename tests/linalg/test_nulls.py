import numpy as np
import pytest
import scipy.stats

from lorabench.linalg.decompose import spectrum_metrics
from lorabench.linalg.nulls import (
    _gaussian_r_factor,
    angle_chance,
    cosine_chance,
    draws_of,
    energy_chance,
    marchenko_pastur_quantiles,
    null_metrics,
    null_spectra,
    null_spectrum,
    projection_chance,
    similarity_chance,
    trace_chance,
)


@pytest.mark.parametrize(("M", "N"), [(300, 300), (200, 500), (500, 200), (100, 1000)])
def test_dense_null_is_what_a_gaussian_matrix_gives(M, N):
    S = np.linalg.svd(np.random.default_rng(0).standard_normal((M, N)), compute_uv=False)
    drawn, null = spectrum_metrics(S / np.linalg.norm(S)), null_metrics(M, N, None)
    for key in ("rank_50", "rank_90", "rank_95", "rank_99"):
        assert null[key][0] == pytest.approx(drawn[key], abs=1.5)
    for key in ("effective_rank_entropy", "stable_rank", "participation_ratio", "nuclear_norm", "spectral_norm"):
        assert null[key][0] == pytest.approx(drawn[key], rel=0.04)


@pytest.mark.parametrize(("M", "N"), [(40, 40), (24, 60)])
def test_draws_of_a_dense_null_are_singular_values_of_gaussian_matrices(M, N):
    """16 draws beside 400 matrices: means within their error, standard deviations within that of 16."""
    random, R = np.random.default_rng(1), min(M, N)
    S = np.linalg.svd(random.standard_normal((400, M, N)), compute_uv=False)
    S /= np.linalg.norm(S, axis=1, keepdims=True)
    drawn = draws_of(M, N, None)
    assert (np.abs(drawn.mean(0) - S.mean(0)) < 4.5 * S.std(0) * (1 / 16 + 1 / 400) ** 0.5).all()
    mean, std = null_spectrum(M, N, None)
    assert np.median(std / S.std(0)) == pytest.approx(1, abs=0.25) and std.shape == mean.shape == (R,)
    found = [spectrum_metrics(each) for each in S]
    for key in ("rank_90", "effective_rank_entropy", "stable_rank", "participation_ratio", "spectral_norm"):
        values, (law, spread) = [each[key] for each in found], null_metrics(M, N, None)[key]
        assert spread == pytest.approx(np.std(values), rel=0.75), "16 draws: four standard errors"
        assert np.mean(np.abs(np.array(values) - law) < 4 * spread) > 0.95, key


@pytest.mark.parametrize("decay", [0, 0.1])
def test_projections_by_chance_are_those_on_random_subspaces(decay):
    random, (M, N) = np.random.default_rng(6), (30, 40)
    S = np.exp(-decay * np.arange(M))
    for r in (1, 4, 30):
        bases = ((np.linalg.qr(random.standard_normal((d, r)))[0] for d in (M, N)) for _ in range(1500))
        norms = np.array([np.linalg.norm(U.T @ (S[:, None] * V[:M])) for U, V in bases])
        std, inverse = projection_chance(S, r, M, N)
        assert std == pytest.approx(norms.std(), rel=0.08)
        assert inverse is None if r == 1 else inverse == pytest.approx((1 / norms).std(), rel=0.15)
    assert projection_chance(S, 30, 30, 30)[0] == pytest.approx(0, abs=1e-7), "the whole space has all of it"


def test_dense_null_of_a_square_matrix_has_the_published_half():
    assert null_metrics(1000, 1000, None)["rank_90"][0] / 1000 == pytest.approx(0.51, abs=0.005)


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
    mean, std = null_metrics(M, N, r)["effective_rank_entropy"]
    assert mean == pytest.approx(np.mean(metrics), abs=4.5 * np.std(metrics) / 4)
    assert std == pytest.approx(np.std(metrics), rel=0.75), "16 draws: four standard errors"


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
    for chance, drawn in zip(angle_chance(p, q, d), (angles, np.linalg.norm(angles, axis=1)), strict=True):
        error = np.hypot(chance.error, drawn.std(0) / 500**0.5)
        assert (np.abs(chance.mean - drawn.mean(0)) <= 4.5 * error + 1e-6).all()
        assert chance.std == pytest.approx(drawn.std(0), rel=0.3, abs=1e-6)
        num_draws = max(16, min(256, 2**14 // (q * (p + q))))
        assert chance.error == pytest.approx(chance.std / num_draws**0.5)


def haar(random, d):
    Q, R = np.linalg.qr(random.standard_normal((d, d)))
    return Q * np.sign(R.diagonal())


@pytest.mark.parametrize("d", [2, 7])
def test_traces_by_chance_are_those_of_random_rotations(d):
    """Of indefinite matrices; exact, so that only the error of the draws is allowed for."""
    random = np.random.default_rng(4)
    A, B = (X + X.T for X in random.standard_normal((2, d, d)))
    draws = np.array([np.trace(A @ Q @ B @ Q.T) for Q in (haar(random, d) for _ in range(4000))])
    mean, std = trace_chance(*((np.trace(X), np.trace(X @ X)) for X in (A, B)), d)
    assert mean == pytest.approx(draws.mean(), abs=4.5 * std / 4000**0.5)
    assert std == pytest.approx(draws.std(), rel=0.06)


def test_energy_by_chance_is_that_in_random_subspaces():
    random = np.random.default_rng(5)
    S, q, d = np.array([3.0, 1.0, 0.1]) * 1e-170, 2, 9
    shares = np.square(S / S[0]) / np.square(S / S[0]).sum()
    draws = [np.linalg.qr(random.standard_normal((d, q)))[0] for _ in range(4000)]
    found = np.array([shares @ np.square(Q[:3]).sum(1) for Q in draws])
    mean, std = energy_chance(S, q, d)
    assert mean == pytest.approx(q / d) and mean == pytest.approx(found.mean(), abs=4.5 * std / 4000**0.5)
    assert std == pytest.approx(found.std(), rel=0.06)
    assert energy_chance(S, d, d) == pytest.approx((1, 0), abs=1e-7), "the whole space holds all of it"
    one = scipy.stats.beta(q / 2, (d - q) / 2)
    assert energy_chance(S[:1], q, d) == pytest.approx((one.mean(), one.std())), "a single direction"


@pytest.mark.parametrize("d", [1, 2, 5, 4096])
def test_cosines_by_chance_have_the_moments_of_their_law(d):
    """cos² of random directions is Beta(1/2, (d-1)/2)."""
    mean, std = cosine_chance(d)
    moment = 1.0 if d == 1 else scipy.stats.beta(0.5, (d - 1) / 2).expect(np.sqrt)
    assert mean == pytest.approx(moment, rel=1e-6) and mean**2 + std**2 == pytest.approx(1 / d)
