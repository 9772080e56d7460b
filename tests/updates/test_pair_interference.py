"""Two updates of one layer against numpy in float64 on dense matrices, whatever the blocks."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabench.updates import pair_interference
from lorabench.updates.pair_interference import gram_overlap, inner, kth_largest, sign_conflicts
from lorabench.updates.update import Update

FORMS = [(2, 3), (None, 3), (2, None), (None, None)]


def update(M, N, rank, seed):
    g = torch.Generator().manual_seed(seed)
    if rank is None:
        return Update(parameter="lin.weight", B=torch.randn(M, N, generator=g))
    return Update(parameter="lin.weight", B=torch.randn(M, rank, generator=g), A=torch.randn(rank, N, generator=g))


def dense(item):
    return item.dense().double().numpy()


@pytest.fixture(params=[7, 2**20])
def block(request, monkeypatch):
    """Blocks of a row each, and one block."""
    monkeypatch.setattr(pair_interference, "BLOCK_ENTRIES", request.param)


@pytest.mark.parametrize("ranks", FORMS)
def test_the_inner_product_of_any_two_forms(ranks, block):
    a, b = (update(13, 7, rank, seed) for seed, rank in enumerate(ranks))
    assert inner(a, b) == pytest.approx((dense(a) * dense(b)).sum(), rel=1e-5)
    assert inner(a, a) == pytest.approx(np.square(dense(a)).sum(), rel=1e-5)


@pytest.mark.parametrize(("p", "q", "d"), [(5, 11, 9), (60, 110, 9)])
def test_the_overlap_of_gram_matrices(block, p, q, d):
    X, Y = torch.randn(p, d), torch.randn(q, d, dtype=torch.float64)
    x, y = X.double().numpy(), Y.numpy()
    assert gram_overlap(X, Y) == pytest.approx(np.trace(x.T @ x @ y.T @ y), rel=1e-5)


def test_the_overlap_of_tall_orthogonal_updates_is_nothing(block):
    Q = torch.linalg.qr(torch.randn(64, 8, dtype=torch.float64))[0].float()
    X, Y = (torch.randn(500, 4) @ half.T for half in Q.split(4, dim=1))
    assert 0 <= gram_overlap(X, Y) < 1e-10 * float(X.square().sum() * Y.square().sum())


@pytest.mark.parametrize("ranks", FORMS)
@pytest.mark.parametrize("top", [0.2, 0.01, 1.0])
def test_sign_conflicts_of_any_two_forms(ranks, top, block):
    a, b = (update(13, 7, rank, seed) for seed, rank in enumerate(ranks))
    x, y = dense(a), dense(b)
    opposite, count = np.sign(x) != np.sign(y), max(1, round(top * x.size))
    bounds = [np.sort(np.abs(each), axis=None)[-count] for each in (x, y)]
    large = (np.abs(x) >= bounds[0] * (1 - 1e-6)) | (np.abs(y) >= bounds[1] * (1 - 1e-6))
    found = sign_conflicts(a, b, top)
    assert found.all == pytest.approx(opposite.mean())
    assert found.top == pytest.approx(opposite[large].mean())


def test_entries_without_a_sign_are_not_counted():
    rows = torch.tensor([[1.0, -2.0, 0.0, 0.0], [3.0, 0.0, 5.0, 0.0]])
    others = torch.tensor([[-1.0, -2.0, 1.0, 0.0], [3.0, 1.0, 0.0, 0.0]])
    a, b = (Update(parameter="lin.weight", B=matrix) for matrix in (rows, others))
    assert sign_conflicts(a, b, 1.0).all == 1 / 3
    nothing = Update(parameter="lin.weight", B=torch.zeros(2, 4))
    assert sign_conflicts(a, nothing, 0.2) == pair_interference.SignConflicts(all=None, top=None, num_all=0, num_top=0)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    data=st.data(),
)
def test_the_kth_largest_magnitude_is_exact(values, data):
    k = data.draw(st.integers(1, len(values)))
    with mock.patch.object(pair_interference, "FEW", data.draw(st.sampled_from([0, pair_interference.FEW]))):
        found = kth_largest(Update(parameter="lin.weight", B=torch.tensor(values)[:, None]), k)
    assert found == sorted(map(abs, values))[-k]
