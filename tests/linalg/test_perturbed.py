"""Top left vectors of W0 + ΔW from W0's SVD, against numpy's dense SVD of the sum in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabench.linalg import krylov, perturbed
from lorabench.linalg.decompose import ThinSVD, thin_svd
from lorabench.linalg.krylov import OVERSAMPLING, Plus
from lorabench.updates import base as bases
from lorabench.updates.base import decompose, top_triplets


def weight(M, N, decay, seed=0):
    g = torch.Generator().manual_seed(seed)
    R = min(M, N)
    U, V = (torch.linalg.qr(torch.randn(d, R, generator=g)).Q for d in (M, N))
    return (U * torch.arange(1, R + 1).float() ** -decay) @ V.mT


def update(W, r, size, seed=1):
    """A ΔW of rank r with σ₁ = `size` · σ₁(W0), partly along W0's own directions."""
    g = torch.Generator().manual_seed(seed)
    svd = torch.linalg.svd(W, full_matrices=False)
    B, A = torch.randn(len(W), r, generator=g), torch.randn(r, W.shape[1], generator=g)
    B = B / len(W) ** 0.5 + 0.5 * svd.U[:, :r]
    B = B * torch.linspace(1, 0.1, r)
    norm = torch.linalg.matrix_norm(B @ A, 2)
    return B * (size * svd.S[0] / norm), A


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(400, 400), (300, 420), (420, 300)]),
    decay=st.floats(0.2, 2),
    r=st.integers(1, 8),
    size=st.sampled_from([0.01, 0.3, 1.0, 3.0]),
    k=st.integers(1, 10),
    seed=st.integers(0, 99),
)
def test_they_span_what_the_dense_svd_finds(shape, decay, r, size, k, seed):
    """With W0's vectors exact: of each exact vector, what lies outside the space found is small."""
    W = weight(*shape, decay, seed)
    B, A = update(W, r, size, seed)
    U, S, _ = np.linalg.svd(W.double().numpy())
    w = k + OVERSAMPLING
    delta = thin_svd(B, A)
    found = perturbed.top_left(W, torch.tensor(S), torch.tensor(U[:, : min(shape)]).float(), delta, w)
    Q = np.linalg.qr(found.double().numpy())[0]
    exact, values, _ = np.linalg.svd((W + B @ A).double().numpy(), full_matrices=False)
    outside = np.linalg.norm(exact[:, :k] - Q @ (Q.T @ exact[:, :k]), axis=0)
    gap = values[:k] / (values[:k] - values[w])  # the better w is separated from the k, the nearer
    assert (outside / gap).max() < 3e-4


@pytest.mark.parametrize("shape", [(700, 600), (600, 700)])
@pytest.mark.parametrize("size", [0.1, 1.0, 5.0])
def test_triplets_and_cosines_with_a_rounded_cache(shape, size, monkeypatch):
    """KEEP exact vectors, the others in float16, as they are cached; no dense SVD is taken."""
    W = weight(*shape, decay=0.6)
    B, A = update(W, 8, size)
    base, delta, matrix = decompose(W), thin_svd(B, A), Plus(W, B, A)
    assert base.svd.U.shape[1] == bases.KEEP < min(shape)
    monkeypatch.setattr(krylov, "thin_svd", None)
    found = top_triplets(base, delta, matrix, 10)
    exact = np.linalg.svd((W + B @ A).double().numpy(), full_matrices=False)
    assert found.S.numpy() == pytest.approx(exact[1][:10], rel=2e-6)
    wanted = np.abs(np.linalg.svd(W.double().numpy(), full_matrices=False)[0].T @ exact[0][:, :10]).max(0)
    assert base.largest_cosines(found.U)[0].numpy() == pytest.approx(wanted, abs=1e-4)


def test_one_round_is_enough(monkeypatch):
    """The start is so near that the iteration's first look ends it: nothing is multiplied with W0 twice."""
    W = weight(900, 900, decay=0.6)
    B, A = update(W, 4, 1.0)
    base = decompose(W)
    monkeypatch.setattr(krylov, "MAX_BLOCKS", 1)
    monkeypatch.setattr(krylov, "thin_svd", None)
    assert len(top_triplets(base, thin_svd(B, A), Plus(W, B, A), 10).S) == 10


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_any_scale(scale):
    W = weight(300, 300, decay=1)
    B, A = update(W, 3, 0.5)
    plain, scaled = (
        perturbed.top_left(W * s, torch.linalg.svdvals(W.double()) * s, torch.linalg.svd(W).U,
                           thin_svd(B * s, A), 12) for s in (1.0, scale)
    )  # fmt: skip
    Q, P = (torch.linalg.qr(found).Q for found in (plain, scaled))
    assert torch.linalg.svdvals(Q.mT @ P)[:8].min() > 1 - 1e-5


def test_a_base_of_zeros():
    W, g = torch.zeros(300, 280), torch.Generator().manual_seed(0)
    B, A = torch.randn(300, 3, generator=g), torch.randn(3, 280, generator=g)
    delta = thin_svd(B, A)
    found = perturbed.top_left(W, torch.zeros(280, dtype=torch.float64), torch.eye(300)[:, :280], delta, 3)
    assert found.isfinite().all()
    assert torch.linalg.svdvals(torch.linalg.qr(found).Q.mT @ delta.U).min() > 1 - 1e-5


def test_an_update_that_is_not_small_is_left_to_the_iteration(monkeypatch):
    monkeypatch.setattr(perturbed, "top_left", None)
    W = weight(300, 300, decay=1)
    B, A = update(W, 40, 0.5)
    delta = thin_svd(B, A)
    assert not perturbed.is_small((300, 300), 40, 18)
    for svd in (delta, ThinSVD(U=delta.U[:, :5], S=delta.S, Vh=delta.Vh[:5])):
        top = top_triplets(decompose(W), svd, Plus(W, B, A), 4)
        assert top.S.numpy() == pytest.approx(np.linalg.svd((W + B @ A).double().numpy())[1][:4], rel=1e-5)
