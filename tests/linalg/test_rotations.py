import numpy as np
import pytest
import torch

from lorabench.linalg.rotations import in_random_directions, turned


@pytest.mark.parametrize(("M", "N"), [(30, 50), (50, 30), (1, 4)])
def test_all_singular_values_stay(M, N):
    S = torch.rand(min(M, N), dtype=torch.float64).sort(descending=True).values
    W = in_random_directions(S, M, N)
    assert np.linalg.svd(W.numpy(), compute_uv=False) == pytest.approx(S.numpy(), abs=1e-12)
    U, V = (turned(torch.eye(d, min(M, N), dtype=torch.float64), seed) for seed, d in enumerate((M, N)))
    assert ((U * S) @ V.mT).numpy() == pytest.approx(W.numpy(), abs=1e-12)


def test_the_directions_are_as_random_ones():
    """Entries of a random rotation have moments 1 / d and 3 / (d (d + 2)); neighbours have no correlation."""
    d = 512
    U = turned(torch.eye(d, dtype=torch.float64), 0).numpy()
    assert np.abs(U.T @ U - np.eye(d)).max() < 1e-12
    assert (U**4).mean() == pytest.approx(3 / (d * (d + 2)), rel=0.02)
    assert abs((np.square(U[1:]) * np.square(U[:-1])).mean() * d**2 - 1) < 0.02
    assert np.abs(U).max() < 6.5 / d**0.5 and not np.allclose(U, turned(torch.eye(d, dtype=torch.float64), 1).numpy())
