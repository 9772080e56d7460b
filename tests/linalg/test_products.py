"""Products by their factors, against numpy's dense ones."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabench.linalg.products import LARGEST, hadamard, kronecker

SIZE, RANK = st.integers(1, 7), st.integers(1, 4)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def whole(B, A):
    return (B if A is None else B @ A).numpy()


@settings(max_examples=60, deadline=None)
@given(SIZE, SIZE, RANK, RANK)
def test_hadamard(M, N, first, second):
    B1, A1, B2, A2 = random(M, first), random(first, N), random(M, second), random(second, N)
    B, A = hadamard(B1, A1, B2, A2)
    assert np.allclose(whole(B, A), (B1 @ A1).numpy() * (B2 @ A2).numpy())
    assert (A is None) == (first * second >= min(M, N))


@settings(max_examples=60, deadline=None)
@given(SIZE, SIZE, SIZE, SIZE, RANK, st.sampled_from(["matrices", "first", "second", "both"]))
def test_kronecker(a, b, c, d, rank, factored):
    first, second = random(a, b), random(c, d)
    first = (random(a, rank), random(rank, b)) if factored in ("first", "both") else first
    second = (random(c, rank), random(rank, d)) if factored in ("second", "both") else second
    B, A = kronecker(first, second)
    dense = [(x[0] @ x[1] if isinstance(x, tuple) else x).numpy() for x in (first, second)]
    assert np.allclose(whole(B, A), np.kron(*dense))
    assert A is None or B.shape[1] < min(B.shape[0], A.shape[1])


@pytest.mark.parametrize("rank", [1, 5])
def test_without_content_the_shapes_are_the_same(rank):
    factors = [random(6, rank), random(rank, 4), random(6, rank), random(rank, 4)]
    for product, arguments in ((hadamard, factors), (kronecker, [random(4, 6).T, (factors[0], factors[1])])):
        empty = [tuple(x.to("meta") for x in a) if isinstance(a, tuple) else a.to("meta") for a in arguments]
        told, real = product(*empty), product(*arguments)
        assert [x is None or x.shape for x in told] == [x is None or x.shape for x in real]


def test_no_hadamard_product_of_other_shapes():
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(1, 4\)"):  # which would be broadcast
        hadamard(random(3, 1), random(1, 4), random(1, 1), random(1, 4))


def test_what_would_be_huge_is_refused_before_it_is_made():
    side = int(LARGEST**0.25) + 1
    with pytest.raises(ValueError, match="takes 8 GiB"):
        kronecker(torch.ones(side, side), torch.ones(side, side))
    row, column = torch.ones(1, 10**6), torch.ones(10**6, 1)
    B, A = kronecker(column, row)
    assert A is not None and B.shape == (10**6, 1)
