"""LyCORIS's products of any shape, held against numpy's on dense matrices."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabench.readers import _lycoris

SIZE = st.integers(1, 5)


@settings(max_examples=60, deadline=None)
@given(M=st.integers(1, 12), N=st.integers(1, 12), r=SIZE, s=SIZE)
def test_a_hadamard_product_of_any_shape(M, N, r, s):
    B1, A1, B2, A2 = (torch.randn(shape, dtype=torch.float64) for shape in ((M, r), (r, N), (M, s), (s, N)))
    B, A = _lycoris.loha(B1, A1, B2, A2)
    assert (A is None) == (r * s >= min(M, N))
    exact = (B1.numpy() @ A1.numpy()) * (B2.numpy() @ A2.numpy())
    assert np.allclose(B if A is None else B @ A, exact)


@settings(max_examples=60, deadline=None)
@given(shapes=st.tuples(SIZE, SIZE, SIZE, SIZE), r=st.integers(1, 3), whole=st.tuples(st.booleans(), st.booleans()))
def test_a_kronecker_product_of_any_shape(shapes, r, whole):
    pairs = [(torch.randn(m, r).double(), torch.randn(r, n).double()) for m, n in (shapes[:2], shapes[2:])]
    tensors = {}
    for i, (pair, is_whole) in enumerate(zip(pairs, whole, strict=True), 1):
        a, b = pair
        tensors |= {f"lokr_w{i}": a @ b} if is_whole else {f"lokr_w{i}_a": a, f"lokr_w{i}_b": b}
    B, A = _lycoris.lokr(**tensors)
    exact = np.kron(*(a.numpy() @ b.numpy() for a, b in pairs))
    assert np.allclose(B if A is None else B @ A, exact)
    assert A is None or B.shape[1] < min(exact.shape)
