"""The iteration against numpy's dense SVD in float64, over shapes, ranks, spectra and the extremes."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorabench.linalg import krylov
from lorabench.linalg.krylov import Dense, Plus, top_svd


def with_spectrum(M, N, decay, seed=0):
    """(M, N) float32 with singular values i^-decay."""
    g = torch.Generator().manual_seed(seed)
    R = min(M, N)
    U, V = (torch.linalg.qr(torch.randn(d, R, generator=g, dtype=torch.float64)).Q for d in (M, N))
    return ((U * torch.arange(1, R + 1, dtype=torch.float64) ** -decay) @ V.mT).float()


def check(svd, W, k, rtol=1e-6):
    exact = np.linalg.svd(W.double().numpy(), compute_uv=False)[:k]
    assert svd.S.numpy() == pytest.approx(exact, rel=rtol, abs=1e-6 * exact[0])
    eye = torch.eye(svd.U.shape[1])
    assert torch.allclose(svd.U.mT @ svd.U, eye, atol=1e-5) and torch.allclose(svd.Vh @ svd.Vh.mT, eye, atol=1e-5)
    residual = W @ svd.Vh.mT - svd.U * svd.S.float()
    assert residual.norm(dim=0).max() <= 2 * krylov.TOLERANCE * exact[0]


@settings(max_examples=30, deadline=None)
@example(M=36, N=36, k=1, decay=1e-5, seed=0)
@given(
    M=st.integers(1, 300), N=st.integers(1, 300), k=st.integers(1, 12), decay=st.floats(0, 3), seed=st.integers(0, 99)
)
def test_top_triplets_are_those_of_the_dense_svd(M, N, k, decay, seed):
    W = with_spectrum(M, N, decay, seed)
    check(top_svd(Dense(W), k), W, min(k, M, N), rtol=krylov.TOLERANCE)  # without gaps a residual is all that bounds σ


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
def test_the_iteration_itself_is_taken_where_it_is_cheaper(shape, monkeypatch):
    W = with_spectrum(*shape, decay=1)
    monkeypatch.setattr(krylov, "thin_svd", None)  # the dense way would fail
    check(top_svd(Dense(W), 5), W, 5)


def test_a_sum_is_never_formed(monkeypatch):
    g = torch.Generator().manual_seed(0)
    W, B, A = with_spectrum(400, 300, 1), torch.randn(400, 3, generator=g), torch.randn(3, 300, generator=g) / 100
    monkeypatch.setattr(Plus, "dense", None)
    for matrix in (Plus(W, B, A), Plus(W, B @ A)):
        check(top_svd(matrix, 5, start=A.mT), W + B @ A, 5, rtol=3e-6)


def test_where_it_does_not_converge_the_dense_svd_is_taken(monkeypatch):
    monkeypatch.setattr(krylov, "MAX_BLOCKS", 1)
    W = torch.randn(200, 150, generator=torch.Generator().manual_seed(0))
    check(top_svd(Dense(W), 6), W, 6)


def test_beside_one_huge_singular_value_the_others_have_their_own_vectors():
    g = torch.Generator().manual_seed(0)
    S = torch.cat([torch.tensor([1000.0]), torch.exp(-torch.arange(499) / 10) + 1e-3]).double()
    U, V = (torch.linalg.qr(torch.randn(d, 500, generator=g, dtype=torch.float64)).Q for d in (600, 500))
    W = ((U * S) @ V.mT).float() + 2e-3 * torch.randn(600, 500, generator=g)
    exact, values, _ = np.linalg.svd(W.double().numpy(), full_matrices=False)
    svd = top_svd(Dense(W), 24, start=V[:, :40].float())  # 4e-5 · σ₁ and further than 5% from their neighbours
    assert svd.S.numpy() == pytest.approx(values[:24], rel=1e-3)
    assert abs((svd.U.numpy() * exact[:, :24]).sum(0)).min() > 0.999


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_where_squares_overflow_or_underflow(scale):
    W = with_spectrum(300, 300, 0.7)
    scaled, plain = top_svd(Dense(W * scale), 6), top_svd(Dense(W), 6)
    assert (scaled.S / scale).numpy() == pytest.approx(plain.S.numpy(), rel=1e-6)
    assert abs((scaled.U * plain.U).sum(0)).min() > 1 - 1e-6


def test_equal_singular_values_and_zero():
    check(top_svd(Dense(torch.eye(200)), 4), torch.eye(200), 4)
    svd = top_svd(Dense(torch.zeros(200, 150)), 4)
    assert svd.S.tolist() == [0.0] * 4 and svd.U.isfinite().all()


def test_a_start_of_the_right_directions_needs_one_block():
    W = with_spectrum(300, 300, 1)
    exact = torch.linalg.svd(W).Vh[:20].mT
    block = torch.linalg.qr(W @ krylov._start_block(Dense(W), exact, 4)).Q
    _, residual = krylov._Bases(Dense(W), block).look(4)
    assert residual < krylov.TOLERANCE


def test_the_residual_that_is_told_is_the_residual():
    W = with_spectrum(300, 280, 0.3)
    bases = krylov._Bases(Dense(W), torch.linalg.qr(torch.randn(300, 12, generator=torch.Generator().manual_seed(0))).Q)
    for _ in range(3):
        triplets, told = bases.look(5)
        svd = triplets()
        residual = (W @ svd.Vh.mT - svd.U * svd.S.float()).norm(dim=0) / svd.S
        assert told == pytest.approx(float(residual.max()), rel=1e-3)
        assert torch.allclose(W.mT @ svd.U, svd.Vh.mT * svd.S.float(), atol=1e-6)
        bases.grow()
