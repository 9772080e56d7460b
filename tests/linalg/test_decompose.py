import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabench.linalg import decompose
from lorabench.linalg.decompose import (
    energy_in_subspace,
    grassmann_distance,
    powerlaw_fit,
    principal_angles,
    similarities_of_all,
    spectrum_metrics,
    subspace_similarity,
    thin_svd,
)

SHAPES = [(40, 30, 4), (30, 40, 4), (7, 50, 1), (6, 5, 9), (50, 8, 8)]
"""The fourth has r > min(M, N)."""


def factors(M, N, r, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(M, r, generator=g, dtype=dtype), torch.randn(r, N, generator=g, dtype=dtype)


def orthonormal(d, k, seed=0):
    return torch.linalg.qr(factors(d, 1, k, torch.float64, seed)[0])[0]


def product(svd):
    k = svd.U.shape[-1]
    return svd.U.double() * svd.S[..., None, :k] @ svd.Vh.double()


def assert_orthonormal(svd, tolerance):
    for Q in (svd.U, svd.Vh.mT):
        assert (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max() < tolerance


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_factored_svd_is_that_of_the_product(shape, dtype, tolerance):
    B, A = factors(*shape, dtype)
    svd = thin_svd(B, A)
    exact = torch.linalg.svdvals(B.double() @ A.double())[: min(shape)]
    assert svd.S.dtype == torch.float64 and svd.U.dtype == dtype
    assert ((svd.S - exact) / exact).abs().max() < tolerance
    assert (product(svd) - B.double() @ A.double()).abs().max() < 20 * tolerance
    assert_orthonormal(svd, 10 * tolerance)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (2100, 6), (6, 2100), (9, 9)])
def test_dense_svd(shape):
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    svd = thin_svd(W)
    exact = torch.linalg.svdvals(W.double())
    assert ((svd.S - exact) / exact[0]).abs().max() < 1e-8
    assert (product(svd) - W).abs().max() < 1e-5
    assert_orthonormal(svd, 1e-5)


@pytest.mark.parametrize("kind", ["decaying", "rank 20", "equal values", "zero"])
def test_only_the_kept_vectors_of_a_large_matrix(kind):
    """Where the other vectors are left out, values and kept vectors are what all of LAPACK's SVD gives."""
    n, keep, g = decompose.LARGE_GRAM + 40, 16, torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(d, n, generator=g, dtype=torch.float64)).Q for d in (n + 30, n))
    S = {
        "decaying": torch.linspace(2, 0, n).exp(),
        "rank 20": torch.cat([torch.linspace(3, 1, 20), torch.zeros(n - 20)]),
        "equal values": torch.ones(n),
        "zero": torch.zeros(n),
    }[kind].double()
    W = ((U * S) @ V.mT).float()
    svd = thin_svd(W, keep=keep)
    assert torch.allclose(svd.S, torch.linalg.svdvals(W.double()), rtol=1e-7, atol=3e-7 * float(S[0]))
    assert svd.U.shape == (n + 30, keep) and svd.Vh.shape == (keep, n)
    eye = torch.eye(keep)
    assert torch.allclose(svd.U.mT @ svd.U, eye, atol=1e-5) and torch.allclose(svd.Vh @ svd.Vh.mT, eye, atol=1e-5)
    assert (W @ svd.Vh.mT - svd.U * svd.S[:keep].float()).abs().max() < 2e-6 * max(1, float(S[0]))


def test_dense_svd_of_a_rank_deficient_matrix_has_orthonormal_vectors():
    B, A = factors(60, 40, 5)
    svd = thin_svd((B.double() @ A.double()).float())
    assert svd.numerical_rank == 5
    assert_orthonormal(svd, 1e-5)


def test_small_singular_values_of_factors_keep_their_digits():
    """The Gram matrix in float32 would lose the last ones; perf.md allows 1e-6."""
    B, A = factors(400, 300, 8)
    B = B * torch.logspace(0, -4, 8)
    exact = thin_svd(B.double(), A.double()).S
    assert ((thin_svd(B, A).S - exact) / exact).abs().max() < 2e-6


@pytest.mark.parametrize("A", [None, torch.randn(3, 5)])
def test_keep_bounds_vectors_not_values(A):
    B = torch.randn(6, 3)
    svd = thin_svd(B, A, keep=2)
    assert svd.U.shape == (6, 2) and len(svd.S) == 3 and svd.Vh.shape[0] == 2


def test_a_batch_gives_what_its_members_give():
    B, A = torch.randn(3, 9, 2), torch.randn(3, 2, 7)
    svd, dense = thin_svd(B, A), thin_svd(B @ A)
    for i in range(3):
        assert torch.allclose(svd.S[i], thin_svd(B[i], A[i]).S)
        assert torch.allclose(dense.S[i, :2], svd.S[i], rtol=1e-5)
    assert torch.allclose(product(svd).float(), B @ A, atol=1e-5)


def test_an_svd_is_told_in_a_line():
    svd = thin_svd(2 * torch.eye(6)[:, :3], torch.eye(3, 5), keep=2)
    assert repr(svd) == "ThinSVD(6 × 5, 3 values, 2 vectors, σ₁ = 2)"
    assert repr(thin_svd(torch.ones(4, 6, 1), torch.ones(4, 1, 5))) == "ThinSVD(4 × 6 × 5, 1 values, 1 vectors)"


def test_zero_update():
    for svd in (thin_svd(torch.zeros(6, 2), torch.randn(2, 5)), thin_svd(torch.zeros(6, 5))):
        assert svd.S.abs().max() == 0 and svd.numerical_rank == 0
        metrics = spectrum_metrics(svd.S.numpy(), svd.numerical_rank)
        norms = {key for key in metrics if key.endswith("norm")}
        assert all(metrics[key] == 0 if key in norms else metrics[key] is None for key in metrics) and len(norms) == 3


def test_numerical_rank_of_dependent_factors():
    B, A = factors(200, 100, 5)
    assert thin_svd(torch.cat([B, B], 1), torch.cat([A, A])).numerical_rank == 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_and_shapes_are_refused(bad):
    B, A = factors(6, 5, 2)
    for row in range(2):
        broken = A.clone()
        broken[row, 4] = bad
        with pytest.raises(ValueError, match="NaN or Inf"):
            thin_svd(B, broken)
    with pytest.raises(ValueError, match="NaN or Inf"):
        thin_svd(broken)
    with pytest.raises(ValueError, match=r"\(6, 2\).*\(3, 5\)"):
        thin_svd(B, torch.zeros(3, 5))


def test_metrics_of_equal_values():
    metrics = spectrum_metrics(np.full(10, 3.0))
    assert [metrics[f"rank_{q}"] for q in (50, 90, 95, 99)] == [5, 9, 10, 10]
    for key in ("effective_rank_entropy", "stable_rank", "participation_ratio"):
        assert metrics[key] == pytest.approx(10)
    assert (metrics["nuclear_norm"], metrics["spectral_norm"]) == (30, 3)
    assert metrics["frobenius_norm"] == pytest.approx(90**0.5)
    assert metrics["powerlaw_alpha"] is None


def test_metrics_of_two_values_by_hand():
    metrics = spectrum_metrics(np.array([3.0, 1.0]))
    assert metrics["rank_90"] == 1 and metrics["rank_95"] == 2
    assert metrics["stable_rank"] == pytest.approx(10 / 9)
    assert metrics["participation_ratio"] == pytest.approx(100 / 82)
    assert metrics["effective_rank_entropy"] == pytest.approx(4 / 3**0.75)  # exp(ln 4 - 3/4 ln 3)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30), st.floats(1e-150, 1e100))
def test_ranks_lie_between_one_and_size_and_ignore_the_scale(values, scale):
    S = np.sort(values)[::-1]
    metrics, scaled = spectrum_metrics(S), spectrum_metrics(S * scale)
    for key in ("rank_50", "rank_99", "effective_rank_entropy", "stable_rank", "participation_ratio"):
        assert 1 - 1e-9 <= metrics[key] <= len(S) + 1e-9
        assert scaled[key] == pytest.approx(metrics[key], rel=1e-9)
    assert metrics["stable_rank"] <= metrics["participation_ratio"] * (1 + 1e-9)  # Σσ⁴ <= σ₁² Σσ²


@pytest.mark.parametrize(("alpha", "seed"), [(2.2, 0), (3.5, 1)])
def test_powerlaw_fit_is_that_of_the_powerlaw_package(alpha, seed):
    import powerlaw  # slow to import, and only this worker needs it

    data = np.random.default_rng(seed).pareto(alpha - 1, 400) + 1
    fit = powerlaw.Fit(data, verbose=False, parameter_ranges={"alpha": [1, None]})
    ours, distance = powerlaw_fit(data)
    assert ours == pytest.approx(fit.power_law.alpha, rel=1e-6)
    assert distance == pytest.approx(fit.power_law.D, rel=1e-6)
    assert powerlaw_fit(data * 1e-9)[0] == pytest.approx(ours)


def test_powerlaw_fit_finds_the_exponent_and_where_the_tail_begins():
    random = np.random.default_rng(0)
    tail, body = random.pareto(1.5, 4000) + 1, random.uniform(0, 1, 1000)
    assert powerlaw_fit(np.concatenate([tail, body]))[0] == pytest.approx(2.5, abs=0.1)


def test_powerlaw_fit_needs_enough_distinct_values():
    assert powerlaw_fit(np.arange(1.0, 50.0)) == (None, None)
    assert powerlaw_fit(np.ones(100)) == (None, None)
    assert powerlaw_fit(np.concatenate([np.zeros(60), np.arange(1.0, 40.0)])) == (None, None)


def test_similarity_is_the_definition():
    U, V = orthonormal(20, 4, 0), orthonormal(20, 6, 1)
    phi = subspace_similarity(U, V)
    for i in range(1, 5):
        for j in range(1, 7):
            direct = torch.linalg.norm(U[:, :i].T @ V[:, :j]) ** 2 / min(i, j)
            assert phi[i - 1, j - 1] == pytest.approx(direct.item())


def test_similarities_of_all_are_those_of_each_two():
    U = torch.stack([orthonormal(20, 4, seed) for seed in range(5)])
    phi = similarities_of_all(U)
    for a in range(5):
        for b in range(5):
            assert torch.allclose(phi[a, b], subspace_similarity(U[a], U[b]), atol=1e-12)


def test_similarity_of_identical_nested_and_orthogonal_subspaces():
    Q = orthonormal(20, 8)
    assert torch.allclose(subspace_similarity(Q, Q[:, :3])[3:], torch.ones(5, 3).cumsum(0).clamp_max(1).double())
    assert subspace_similarity(Q[:, :4], Q[:, 4:]).abs().max() < 1e-12
    assert torch.allclose(subspace_similarity(Q, Q).diagonal(), torch.ones(8).double())


@pytest.mark.parametrize(("p", "q"), [(3, 3), (2, 6), (6, 2)])
def test_angles_are_scipys(p, q):
    U, V = orthonormal(30, p, 0), orthonormal(30, q, 1)
    expected = np.sort(scipy.linalg.subspace_angles(U.numpy(), V.numpy()))
    assert principal_angles(U, V).numpy() == pytest.approx(expected, abs=1e-12)
    assert grassmann_distance(principal_angles(U, V)) == pytest.approx(np.linalg.norm(expected))


def test_small_angles_keep_their_digits():
    Q, wanted = orthonormal(30, 6), torch.tensor([1e-12, 1e-6, 0.3, 1.5], dtype=torch.float64)
    V = torch.cat([Q[:, :2] * wanted[:2].cos() + Q[:, 4:] * wanted[:2].sin(), orthonormal(30, 2, 3)], 1)[:, :2]
    assert principal_angles(Q[:, :4], V).numpy() == pytest.approx(wanted[:2].numpy(), rel=1e-3)


def test_angles_of_extremes():
    Q = orthonormal(20, 8)
    rotation = orthonormal(4, 4, 5)
    assert principal_angles(Q[:, :4], Q[:, :4] @ rotation).max() < 1e-12
    assert principal_angles(Q[:, :6], Q[:, 1:3]).max() < 1e-12
    assert torch.allclose(principal_angles(Q[:, :4], Q[:, 4:]), torch.full((4,), torch.pi / 2).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_energy_in_a_subspace_is_that_of_the_dense_projection(dtype):
    B, A = factors(40, 30, 5, dtype)
    svd, Q = thin_svd(B, A), orthonormal(40, 7, seed=3)
    W, P = (B @ A).double().numpy(), (Q @ Q.mT).numpy()
    expected = np.linalg.norm(P @ W) ** 2 / np.linalg.norm(W) ** 2
    for matrix in (svd.U * svd.S.to(dtype), B @ A):
        assert energy_in_subspace(matrix, Q) == pytest.approx(expected, rel=1e-5)
    assert energy_in_subspace(1e-30 * B @ A, Q) == pytest.approx(expected, rel=1e-5), "scale plays no part"


def test_energy_of_a_matrix_in_its_own_and_in_an_orthogonal_subspace():
    eye = torch.eye(20, dtype=torch.float64)
    W = torch.cat([orthonormal(8, 8) * torch.arange(1.0, 9), torch.zeros(12, 8)])
    assert energy_in_subspace(W, eye[:, :8]) == pytest.approx(1) and energy_in_subspace(W, eye[:, 8:]) == 0


def test_energy_in_random_subspaces_is_on_average_their_share_of_the_dimensions():
    W = factors(30, 20, 2, torch.float64)[0] * torch.tensor([5.0, 1.0])
    shares = np.array([energy_in_subspace(W, orthonormal(30, 6, seed)) for seed in range(300)])
    assert shares.mean() == pytest.approx(6 / 30, abs=4.5 * shares.std() / 300**0.5)


@st.composite
def updates(draw):
    """B (M, r) and A (r, N) of any shape, rank, dtype and size; some with repeated columns, so that rank is lacking."""
    M, N, r = (draw(st.integers(1, size)) for size in (40, 40, 12))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    B, A = torch.randn(M, r, generator=g), torch.randn(r, N, generator=g)
    if draw(st.booleans()):
        B, A = B[:, torch.arange(r) // 2], A[torch.arange(r) // 2]
    return (B * 10 ** draw(st.floats(-3, 3))).to(dtype), A.to(dtype)


def oracle(S):
    """The definitions of formulas.md, in numpy and one line each."""
    E, p = S**2, S[S > 0] / S.sum()
    return {f"rank_{q}": next(k for k in range(1, len(S) + 1) if E[:k].sum() >= q / 100 * E.sum() * (1 - 1e-9))
            for q in (50, 90, 95, 99)} | {
        "effective_rank_entropy": np.exp(-np.sum(p * np.log(p))),
        "stable_rank": E.sum() / E[0],
        "participation_ratio": E.sum() ** 2 / np.sum(S**4),
        "nuclear_norm": S.sum(),
        "frobenius_norm": np.sqrt(E.sum()),
        "spectral_norm": S[0],
    }  # fmt: skip


@settings(deadline=None, max_examples=80)
@given(updates())
def test_every_metric_is_that_of_the_dense_matrix(factors):
    """Factored and dense, against numpy's SVD of the product in float64."""
    B, A = factors
    exact = np.linalg.svd(B.double().numpy() @ A.double().numpy(), compute_uv=False)
    expected = oracle(exact[exact > 1e-12 * exact[0]])
    dense = B.double() @ A.double()
    for svd in (thin_svd(B, A), thin_svd(dense), thin_svd(dense.float())):
        found = spectrum_metrics(svd.S.numpy(), svd.numerical_rank)
        for key, value in expected.items():
            if key.startswith("rank_"):
                shares = (exact**2).cumsum() / (exact**2).sum()
                near = np.abs(shares - int(key[5:]) / 100).min() < 1e-5  # a tie that rounding may break either way
                assert near or found[key] == value, key
            else:
                assert found[key] == pytest.approx(value, rel=2e-5), key


@settings(deadline=None, max_examples=40)
@given(updates(), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_metrics_do_not_change_with_rotation_transposition_and_scale(factors, scale, seed):
    B, A = (factor.double() for factor in factors)
    before = spectrum_metrics(thin_svd(B, A).S.numpy())
    left, right = orthonormal(B.shape[0], B.shape[0], seed), orthonormal(A.shape[1], A.shape[1], seed + 1)
    changed = {
        "rotated": thin_svd(left @ B, A @ right),
        "transposed": thin_svd(A.mT, B.mT),
        "scaled": thin_svd(scale * B, A),
    }
    for how, svd in changed.items():
        after = spectrum_metrics(svd.S.numpy())
        for key in ("effective_rank_entropy", "stable_rank", "participation_ratio", "frobenius_norm", "nuclear_norm"):
            factor = scale if how == "scaled" and key.endswith("norm") else 1
            assert after[key] == pytest.approx(factor * before[key], rel=1e-7), (how, key)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 40), st.data())
def test_similarity_and_angles_agree_with_scipy_and_each_other(d, data):
    """φ(p, q) is the mean of cos² over the smaller dimension; neither changes when both sides are rotated."""
    p, q = (data.draw(st.integers(1, d)) for _ in range(2))
    seed = data.draw(st.integers(0, 999))
    U, V, R = orthonormal(d, p, seed), orthonormal(d, q, seed + 1), orthonormal(d, d, seed + 2)
    angles = np.sort(scipy.linalg.subspace_angles(U.numpy(), V.numpy()))
    assert principal_angles(U, V).numpy() == pytest.approx(angles, abs=1e-7)
    phi = subspace_similarity(U, V)
    assert phi[-1, -1].item() == pytest.approx(np.mean(np.cos(angles) ** 2), abs=1e-10)
    assert torch.allclose(subspace_similarity(R @ U, R @ V), phi, atol=1e-10)
    assert torch.allclose(subspace_similarity(V, U), phi.mT, atol=1e-10)
    assert phi.min() >= 0 and phi.max() <= 1
