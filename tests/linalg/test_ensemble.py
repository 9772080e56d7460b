"""One subspace for many updates: against dense matrices by the definitions, planted structure, and chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorabench.linalg import ensemble
from lorabench.linalg.decompose import ThinSVD, thin_svd
from lorabench.linalg.ensemble import explained, explained_by_chance, left_out, sampled

M, N = 40, 56


def svds(count: int, r: int = 3, seed: int = 0, make=None) -> list[ThinSVD]:
    """`make(generator)` gives ΔW in float32; else B A of Gaussian factors."""
    g = torch.Generator().manual_seed(seed)
    make = make or (lambda g: (torch.randn(M, r, generator=g), torch.randn(r, N, generator=g)))
    return [thin_svd(*make(g)) for _ in range(count)]


def side_of(some: list[ThinSVD], side: str):
    frames = [svd.Vh.mT if side == "input" else svd.U for svd in some]
    return frames, [svd.S / svd.S.norm() for svd in some]


def dense(some: list[ThinSVD]) -> list[np.ndarray]:
    """Of norm 1."""
    found = [(svd.U.double() * svd.S @ svd.Vh.double()).numpy() for svd in some]
    return [W / np.linalg.norm(W) for W in found]


def top(gram: np.ndarray, k: int) -> np.ndarray:
    return np.linalg.eigh(gram)[1][:, -k:]


def by_definition(updates: list[np.ndarray], k: int) -> dict[str, tuple[float, ...]]:
    """Each left out by itself; of the output side the transposed updates."""
    found = {}
    for side, Ws in (("input", updates), ("output", [W.T for W in updates])):
        rows = []
        for i, W in enumerate(Ws):
            others = [X for j, X in enumerate(Ws) if j != i]
            mean = np.mean(others, 0)
            without = [X - (X * mean).sum() / (mean * mean).sum() * mean for X in [*others, W]]
            shared = np.linalg.norm(W @ top(sum(X.T @ X for X in others), k)) ** 2
            directions = np.linalg.norm(W @ top(mean.T @ mean, k)) ** 2
            rest = np.linalg.norm(without[-1] @ top(sum(X.T @ X for X in without[:-1]), k)) ** 2
            beyond = rest / np.linalg.norm(without[-1]) ** 2
            rows.append((shared, directions, beyond, 1 - np.linalg.norm(without[-1]) ** 2))
        found[side] = tuple(np.mean(rows, 0))
    return found


@pytest.mark.parametrize("count", [2, 6])
def test_left_out_is_what_its_definition_gives_of_dense_updates(count) -> None:
    some = svds(count)
    expected = by_definition(dense(some), 3)
    for side, found in left_out(some, 3).items():
        shared, directions, beyond, mean = expected[side]
        assert (found.shared, found.mean_directions, found.mean) == pytest.approx((shared, directions, mean), abs=1e-5)
        assert found.beyond_mean == (None if count == 2 else pytest.approx(beyond, abs=1e-5))


@pytest.mark.parametrize("side", ["input", "output"])
def test_explained_is_the_sum_of_eigenvalues(side) -> None:
    some = svds(5)
    grams = [W.T @ W if side == "input" else W @ W.T for W in dense(some)]
    values = np.linalg.eigvalsh(sum(grams) / 5)[::-1]
    found = explained(*side_of(some, side))
    assert found.numpy() == pytest.approx(np.cumsum(values)[: len(found)], abs=1e-6)
    assert len(found) == 15 and found[-1] == pytest.approx(1)


def test_large_ones_are_near_all_eigenvalues(monkeypatch) -> None:
    some = svds(30)
    exact = explained(*side_of(some, "input"))
    monkeypatch.setattr(ensemble, "EXACT", 8)
    monkeypatch.setattr(ensemble, "BLOCK", 6)
    monkeypatch.setattr(ensemble, "BLOCKS", 6)
    monkeypatch.setattr(ensemble, "MOST_DIRECTIONS", 4)
    found = explained(*side_of(some, "input"))
    assert found.numpy() == pytest.approx(exact[:4].numpy(), rel=0.02) and (found <= exact[:4] + 1e-6).all()


def test_a_krylov_space_of_all_dimensions_gives_all_eigenvalues(monkeypatch) -> None:
    """4 blocks of 14 span the 56 input directions; in tiles of 7 of the 90 rows."""
    some = svds(30)
    exact = explained(*side_of(some, "input"))
    for name, size in {"EXACT": 8, "BLOCK": 14, "BLOCKS": 4, "TILE": 7}.items():
        monkeypatch.setattr(ensemble, name, size)
    assert explained(*side_of(some, "input")).numpy() == pytest.approx(exact.numpy(), rel=1e-5)


def test_unrelated_updates_give_what_chance_gives() -> None:
    drawn = [svds(12, seed=seed) for seed in range(8)]
    tests = [left_out(some, 3) for some in drawn]
    for side, d in (("input", N), ("output", M)):
        found = np.mean([explained(*side_of(some, side)).numpy() for some in drawn], 0)
        chance = [explained_by_chance(d, side_of(some, side)[1]).numpy() for some in drawn]
        assert found == pytest.approx(np.mean(chance, 0), rel=0.05)
        draws = [test[side] for test in tests]
        for name in ("shared", "mean_directions", "beyond_mean"):
            assert np.mean([getattr(draw, name) for draw in draws]) == pytest.approx(3 / d, rel=0.15)
        assert np.mean([draw.mean for draw in draws]) < 3 / (M * N)


def test_identical_updates_share_all_and_nothing_is_beyond_their_mean() -> None:
    some = svds(1) * 5
    assert explained(*side_of(some, "input"))[2] == pytest.approx(1, abs=1e-6)
    for found in left_out(some, 3).values():
        assert (found.shared, found.mean_directions, found.mean) == pytest.approx((1, 1, 1), abs=1e-6)
        assert found.beyond_mean is None


def test_orthogonal_updates_share_nothing() -> None:
    Q, P = (torch.linalg.qr(torch.randn(d, 12, generator=torch.Generator().manual_seed(0))).Q for d in (M, N))
    some = [thin_svd(Q[:, 3 * i : 3 * i + 3], P[:, 3 * i : 3 * i + 3].mT) for i in range(4)]
    assert explained(*side_of(some, "input")).numpy() == pytest.approx(np.arange(1, 13) / 12, abs=1e-6)
    for found in left_out(some, 3).values():
        assert (found.shared, found.mean_directions, found.mean) == pytest.approx((0, 0, 0), abs=1e-6)


def test_where_the_others_have_fewer_directions_none_are_added() -> None:
    Q, P = (torch.linalg.qr(torch.randn(d, 6, generator=torch.Generator().manual_seed(0))).Q for d in (M, N))
    some = [thin_svd(Q[:, at], P[:, at].mT) for at in (slice(0, 1), slice(1, 2), slice(2, 6))]
    for found in left_out(some, 4).values():
        assert (found.shared, found.mean_directions) == pytest.approx((0, 0), abs=1e-9)


def test_a_planted_subspace_is_told_from_a_shared_mean() -> None:
    """Both share directions; only of the first is something left when the mean adapter is taken away."""
    g = torch.Generator().manual_seed(1)
    Q, P = (torch.linalg.qr(torch.randn(d, 4, generator=g)).Q for d in (M, N))
    base = torch.randn(M, 4, generator=g) @ torch.randn(4, N, generator=g)

    def subspace(g):
        return Q @ torch.randn(4, 4, generator=g), torch.randn(4, 4, generator=g) @ P.mT

    def mean(g):
        return base + torch.randn(M, 2, generator=g) @ torch.randn(2, N, generator=g), None

    for side, d in (("input", N), ("output", M)):
        planted, shifted = (left_out(svds(12, make=make), 4)[side] for make in (subspace, mean))
        assert planted.shared == pytest.approx(1, abs=1e-5) and planted.beyond_mean == pytest.approx(1, abs=1e-5)
        assert planted.mean < 0.3
        assert shifted.shared > 0.5 and shifted.mean > 0.5
        assert shifted.beyond_mean < 2.5 * 4 / d < shifted.shared


def test_scales_and_order_change_nothing() -> None:
    some = svds(4)
    scaled = [ThinSVD(U=svd.U, S=svd.S * (10.0**i), Vh=svd.Vh) for i, svd in enumerate(some)]
    first, second = left_out(some, 3)["input"], left_out(scaled[::-1], 3)["input"]
    assert first.shared == pytest.approx(second.shared) and first.beyond_mean == pytest.approx(second.beyond_mean)


def test_what_is_left_out_is_bounded_and_spread_evenly() -> None:
    assert sampled([16] * 500)[:3] == [0, 31, 62] and len(sampled([16] * 500)) == 16
    assert sampled([4] * 5) == [0, 1, 2, 3, 4] and sampled([300, 300, 300]) == [0, 1]
    groups = left_out(svds(20, r=1), 1)["input"]
    assert 0 <= groups.shared <= 1
