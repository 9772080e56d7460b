"""Interference of two updates: the extremes, chance, and numpy in float64 on dense matrices."""

import numpy as np
import pytest
import torch

from lorabench.analyses.interference import TOP, Interference
from lorabench.linalg.decompose import thin_svd
from lorabench.updates.formats import DENSE_VECTORS
from lorabench.updates.layer import LayerSVD
from lorabench.updates.update import Update


def layer(B, A=None, keep=None):
    update = Update(parameter="lin.weight", B=B, A=A)
    return LayerSVD(parameter="lin.weight", svd=thin_svd(B, A, keep=keep), update=update)


def factored(M, N, r, seed=0):
    g = torch.Generator().manual_seed(seed)
    return layer(torch.randn(M, r, generator=g), torch.randn(r, N, generator=g))


def values(a, b, column="value"):
    return {row["metric"]: row[column] for row in Interference().compute(a, b)}


def cosine(x, y):
    return (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)


def expected(a, b):
    x, y = (each.update.dense().double().numpy() for each in (a, b))
    opposite = np.sign(x) != np.sign(y)
    large = np.zeros(x.shape, bool)
    for each in (x, y):
        order = np.argsort(-np.abs(each), axis=None)[: round(TOP * x.size)]
        large.flat[order] = True
    return {
        "cosine": cosine(x, y),
        "overlap_input": cosine(x.T @ x, y.T @ y),
        "overlap_output": cosine(x @ x.T, y @ y.T),
        "sign_conflict": opposite.mean(),
        "sign_conflict_top": opposite[large].mean(),
        "norm_ratio": np.linalg.norm(x + y) / np.hypot(np.linalg.norm(x), np.linalg.norm(y)),
    }


def test_against_dense_matrices():
    g = torch.Generator().manual_seed(5)
    whole = layer(torch.randn(90, 80, generator=g), keep=DENSE_VECTORS)
    assert whole.svd.U.shape[1] < len(whole.svd.S)
    for a, b in [(factored(20, 30, 3), factored(20, 30, 5, 1)), (factored(90, 80, 4), whole), (whole, whole)]:
        assert values(a, b) == pytest.approx(expected(a, b), rel=1e-5)
        assert {*values(a, b)} == {*Interference.metrics}


def test_an_svd_with_all_its_vectors_stands_for_the_update():
    a, b = factored(20, 30, 3), factored(20, 30, 5, 1)
    bare = [LayerSVD(parameter="lin.weight", svd=each.svd) for each in (a, b)]
    assert values(*bare) == pytest.approx(values(a, b), rel=1e-4)
    half = LayerSVD(parameter="lin.weight", svd=a.svd.top(2))
    assert Interference().compute(half, b) == [], "some vectors alone are not the update"


def test_the_same_update_written_with_other_factors():
    a = factored(20, 30, 3)
    mix = torch.linalg.qr(torch.randn(3, 3))[0]
    again = layer(a.update.B @ mix, mix.T @ a.update.A)
    found = values(a, again)
    assert found["sign_conflict_top"] == 0 and found["sign_conflict"] < 0.002
    for metric in ("cosine", "overlap_input", "overlap_output"):
        assert found[metric] == pytest.approx(1, abs=1e-5)
    assert found["norm_ratio"] == pytest.approx(2**0.5)


def test_the_opposite_update():
    a = factored(20, 30, 3)
    found = values(a, layer(-2 * a.update.B, a.update.A))
    assert found["sign_conflict"] == found["sign_conflict_top"] == 1
    assert found["cosine"] == pytest.approx(-1) and found["overlap_input"] == pytest.approx(1)
    assert found["norm_ratio"] == pytest.approx(1 / 5**0.5)


def test_updates_that_share_no_direction():
    zeros = torch.zeros(10, 2)
    a = layer(torch.cat([torch.randn(10, 2), zeros]), torch.cat([torch.randn(8, 2), torch.zeros(6, 2)]).T)
    b = layer(torch.cat([zeros, torch.randn(10, 2)]), torch.cat([torch.zeros(8, 2), torch.randn(6, 2)]).T)
    found = values(a, b)
    assert [found[m] for m in ("cosine", "overlap_input", "overlap_output")] == pytest.approx([0, 0, 0], abs=1e-12)
    assert found["norm_ratio"] == pytest.approx(1)
    assert "sign_conflict" not in found, "no entry has two signs"


@pytest.mark.parametrize(("rank_a", "rank_b"), [(2, 2), (2, 16)])
def test_unrelated_updates_are_at_chance(rank_a, rank_b):
    pairs = [(factored(40, 60, rank_a, seed), factored(40, 60, rank_b, 1000 + seed)) for seed in range(60)]
    rows = [row for pair in pairs for row in Interference().compute(*pair)]
    for metric in Interference.metrics:
        mine = [row for row in rows if row["metric"] == metric]
        found = np.array([row["value"] for row in mine])
        error = found.std(ddof=1) / len(found) ** 0.5
        assert found.mean() == pytest.approx(np.mean([row["null"] for row in mine]), abs=4 * error), metric
        spread = found - [row["null"] for row in mine]  # the mean differs with the spectra
        stds = np.array([row["null_std"] for row in mine])
        assert spread.std(ddof=1) == pytest.approx(np.square(stds).mean() ** 0.5, rel=4 / 120**0.5), metric


def test_a_zero_update_has_no_rows():
    assert Interference().compute(factored(20, 30, 3), layer(torch.zeros(20, 1), torch.zeros(1, 30))) == []
