"""Analyses beside W0, against dense SVDs in float64, the closed forms and the published figures."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch

from lorabench.analyses.accumulation import Accumulation
from lorabench.analyses.alignment import Alignment, projected_norms
from lorabench.analyses.intruders import DEGENERATE, Intruders, degenerate
from lorabench.analyses.survival import Survival
from lorabench.analysis.tidy import to_table
from lorabench.linalg.decompose import thin_svd
from lorabench.linalg.nulls import similarity_chance
from lorabench.updates import base as bases
from lorabench.updates.base import Tuned, decompose
from lorabench.updates.layer import LayerSVD
from lorabench.updates.update import Update


def decaying(M, N, seed=0, power=0.7):
    """A W0 with a spectrum as trained weights have it."""
    g = torch.Generator().manual_seed(seed)
    R = min(M, N)
    U, V = (torch.linalg.qr(torch.randn(d, R, generator=g)).Q for d in (M, N))
    return (U * torch.arange(1, R + 1) ** -power) @ V.mT


def tuned(W, B, A=None):
    update = Update(parameter="model.layers.0.mlp.up_proj.weight", B=B, A=A)
    layer = LayerSVD(parameter=update.parameter, svd=thin_svd(B, A), rank=A is not None and A.shape[0], update=update)
    return Tuned(layer=layer, base=decompose(W))


def factors(M, N, r, seed=1, size=1.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(M, r, generator=g) * (size / M**0.5), torch.randn(r, N, generator=g) / N**0.5


def frame(analysis, subject):
    return to_table(analysis.compute(subject), {"layer": "l"}).to_pandas()


def value(rows, metric, column="value", **where):
    for key, wanted in where.items():
        rows = rows[rows[key] == wanted]
    (found,) = rows[rows["metric"] == metric][column]
    return found


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (300, 280)])
@pytest.mark.parametrize("dense", [False, True])
def test_alignment_is_that_of_dense_svds(shape, dense):
    W, (B, A) = decaying(*shape), factors(*shape, 6)
    rows = frame(Alignment(), tuned(W, B @ A) if dense else tuned(W, B, A))
    delta, W64 = (B.double() @ A.double()).numpy(), W.double().numpy()
    U, S, Vh = np.linalg.svd(delta)
    for r in (1, 2, 4, 6):
        norm = np.linalg.norm(U[:, :r].T @ W64 @ Vh[:r].T)
        assert value(rows, "projected_norm_at", r=r) == pytest.approx(norm, rel=1e-4)
        assert value(rows, "amplification_at", r=r) == pytest.approx(np.linalg.norm(S) / norm, rel=1e-4)
        own = np.linalg.norm(np.linalg.svd(W64, compute_uv=False)[:r])
        assert value(rows, "projected_norm_of_base_at", r=r) == pytest.approx(own, rel=1e-5)
    assert value(rows, "amplification") == pytest.approx(value(rows, "amplification_at", r=6))
    assert value(rows, "base_norm") == pytest.approx(np.linalg.norm(W64), rel=1e-6)
    assert value(rows, "update_norm") == pytest.approx(np.linalg.norm(delta), rel=1e-6)


def test_random_directions_project_as_the_null_says():
    """The random column of the paper's table 7: r ‖W‖ / √(M N), a mean square over draws."""
    W, r = decaying(50, 70), 5
    g = torch.Generator().manual_seed(0)
    draws = [
        projected_norms(
            torch.linalg.qr(torch.randn(50, r, generator=g)).Q, W, torch.linalg.qr(torch.randn(70, r, generator=g)).Q.mT
        )
        for _ in range(2000)
    ]
    square = torch.stack(draws).square().mean(0)
    expected = torch.arange(1, r + 1) * W.norm() / (50 * 70) ** 0.5
    assert square.sqrt().tolist() == pytest.approx(expected.tolist(), rel=0.05)
    rows = frame(Alignment(), tuned(W, *factors(50, 70, r)))
    assert value(rows, "projected_norm", "null") == pytest.approx(float(expected[-1]), rel=1e-6)


@pytest.mark.parametrize("r", [1, 2, 4])
def test_random_updates_amplify_as_the_null_says(r):
    """A geometric mean, as layers are averaged: at r = 1 it is 1.9 times the reciprocal of the mean square's root."""
    W = torch.randn(60, 80, generator=torch.Generator().manual_seed(0))
    found = [frame(Alignment(), tuned(W, *factors(60, 80, r, seed))) for seed in range(400)]
    logs = [[np.log(value(rows, "amplification", column)) for rows in found] for column in ("value", "null")]
    spread = np.std(np.subtract(*logs)) / 400**0.5
    assert abs(np.subtract(*logs).mean()) < 4 * spread
    assert np.exp(np.mean(logs[1])) == pytest.approx(np.exp(np.mean(logs[0])), rel=0.3 / r)
    rows = pd.concat(found).groupby("metric").agg({"value": "std", "null_std": "mean", "null": "mean"})
    for metric in ("projected_norm", "amplification") if r == 4 else ("projected_norm",):
        std = rows.loc[metric, "null_std"]
        assert rows.loc[metric, "value"] == pytest.approx(std, rel=0.2), "but for the spread of ‖ΔW‖, in amplification"
    assert np.isnan(value(found[0], "amplification", "null_std")) == (r == 1), "without a variance at one direction"


@pytest.mark.parametrize(("r", "published"), [(4, 0.02), (64, 0.33)])
def test_the_random_rows_of_the_papers_table_7(r, published):
    """GPT-3's query matrix of layer 48: ‖W‖_F = 61.95, 12288 x 12288; to the digits that are printed."""
    assert r * 61.95 / 12288 == pytest.approx(published, abs=0.0075)


def test_an_update_along_the_top_of_w0_amplifies_nothing_new():
    W = decaying(40, 40)
    svd = thin_svd(W)
    rows = frame(Alignment(), tuned(W, svd.U[:, :3] * svd.S[:3].float(), svd.Vh[:3]))
    assert value(rows, "amplification") == pytest.approx(1, rel=1e-5)
    assert value(rows, "projected_norm") == pytest.approx(value(rows, "projected_norm_of_base"), rel=1e-5)


def dense_cosines(W, delta, k):
    U0 = np.linalg.svd(W.double().numpy(), full_matrices=False)[0]
    U1 = np.linalg.svd((W.double() + delta.double()).numpy(), full_matrices=False)[0]
    return np.abs(U0.T @ U1[:, :k]).max(0)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (330, 300), (300, 330)])
@pytest.mark.parametrize("size", [0.3, 1.0, 3.0])
def test_intruders_are_those_of_dense_svds(shape, size):
    W, (B, A) = decaying(*shape), factors(*shape, 8, size=2 * size)
    rows = frame(Intruders(), tuned(W, B, A))
    cosines = dense_cosines(W, B @ A, 32)
    found = rows[rows["metric"] == "largest_cosine"].set_index("k")
    clear = found.index[found["num_degenerate"] == 0]
    assert len(clear) > 5
    assert found.loc[clear, "value"].to_numpy() == pytest.approx(cosines[clear - 1], abs=2e-3)
    assert found.loc[clear[clear <= 10], "value"].to_numpy() == pytest.approx(cosines[clear[clear <= 10] - 1], abs=1e-3)
    for epsilon in (0.3, 0.5, 0.7):
        for k in (1, 5, 10):
            near = np.abs(cosines[:k] - epsilon).min() < 2e-3 or not {*range(1, k + 1)} <= {*clear}
            count = value(rows, "count", epsilon=epsilon, k=k)
            assert near or count == (cosines[:k] < epsilon).sum()
    assert value(rows, "num_intruders") == value(rows, "count", epsilon=0.5, k=10)


def test_the_iteration_counts_as_the_dense_svd_does(monkeypatch):
    """Of W0 wide enough that W0 + ΔW is iterated, and its left vectors kept in float16."""
    W, (B, A) = decaying(700, 650), factors(700, 650, 8, size=4)
    monkeypatch.setattr(bases, "TUNED_VECTORS", 10)
    monkeypatch.setattr(bases.Plus, "dense", None)
    subject = tuned(W, B, A)
    left = subject.base.left[:, subject.base.svd.U.shape[1] :]
    assert left.shape[1] and torch.equal(left, left.half().float())
    cosines, _ = subject.base.largest_cosines(subject.svd.U)
    assert cosines.numpy() == pytest.approx(dense_cosines(W, B @ A, 10), abs=1e-3)


def test_a_small_update_has_no_intruders_and_a_new_strong_direction_is_one():
    W, (B, A) = decaying(80, 60, power=0.3), factors(80, 60, 1)
    assert value(frame(Intruders(), tuned(W, 1e-4 * B, A)), "num_intruders") == 0
    rows = frame(Intruders(), tuned(W, 30 * B, A))
    assert value(rows, "num_intruders") == value(rows, "count", epsilon=0.5, k=1) == 1
    assert value(rows, "num_intruders", "null") == 1, "random directions intrude as well"
    assert not Intruders().compute(tuned(W, 0 * B, A))


def test_the_null_of_a_dense_update_has_all_of_its_singular_values():
    """Of which few vectors are kept; by numpy on W0 + ΔW with these values in the null's directions."""
    W, delta = decaying(60, 40), 2.5 * torch.linalg.qr(torch.randn(60, 40))[0]
    svd = thin_svd(delta, keep=4)
    update = Update(parameter="model.layers.0.mlp.up_proj.weight", B=delta)
    subject = Tuned(layer=LayerSVD(parameter=update.parameter, svd=svd, update=update), base=decompose(W))
    cosines = []
    for each in subject.nulls:
        null = each.delta()
        assert np.linalg.svd(null.numpy(), compute_uv=False) == pytest.approx(np.full(40, 2.5), rel=1e-5)
        assert (torch.linalg.norm(null @ each.layer.svd.Vh.mT, dim=0) - 2.5).abs().max() < 1e-5
        cosines.append(dense_cosines(W, null, 10))
    rows, num = frame(Intruders(), subject), (np.array(cosines) < 0.5).sum(1)
    assert len({*num}) > 1, "draws of their own"
    assert value(rows, "num_intruders", "null") == num.mean()
    assert value(rows, "num_intruders", "null_std") == pytest.approx(num.std(ddof=1))
    found = rows[(rows["metric"] == "largest_cosine") & (rows["k"] <= 10)]
    assert found["null"].to_numpy() == pytest.approx(np.mean(cosines, 0), abs=1e-3)
    assert found["null_std"].to_numpy() == pytest.approx(np.std(cosines, 0, ddof=1), abs=1e-3)


def test_neighbours_within_a_percent_are_degenerate():
    assert degenerate(torch.tensor([5.0, 3.0, 3.0 * (1 - DEGENERATE / 2), 1.0])).tolist() == [False, True, True, False]


@pytest.mark.parametrize("shape", [(60, 40), (330, 300)])
def test_survival_is_that_of_dense_svds(shape):
    W, (B, A) = decaying(*shape), factors(*shape, 4, size=0.5)
    rows = frame(Survival(), tuned(W, B, A))
    W64 = W.double().numpy()
    before = np.linalg.svd(W64, full_matrices=False)
    after = np.linalg.svd(W64 + (B.double() @ A.double()).numpy(), full_matrices=False)
    for k in (1, 3, 10):
        for side, a, b in (("output", before[0], after[0]), ("input", before[2].T, after[2].T)):
            phi = np.linalg.norm(a[:, :k].T @ b[:, :k]) ** 2 / k
            assert value(rows, "survival_at", side=side, k=k) == pytest.approx(phi, abs=1e-3)
            assert value(rows, "survival_at", "null", side=side, k=k) == pytest.approx(k / a.shape[0])
            _, std = similarity_chance(k, k, a.shape[0])
            assert value(rows, "survival_at", "null_std", side=side, k=k) == pytest.approx(std[-1, -1])
        shift = after[1][k - 1] / before[1][k - 1] - 1
        assert value(rows, "singular_value_shift", k=k) == pytest.approx(shift, abs=1e-5)


def test_everything_survives_no_update_and_chance_a_random_one():
    W = decaying(100, 90)
    rows = frame(Survival(), tuned(W, torch.zeros(100, 1), torch.zeros(1, 90)))
    assert rows[rows["metric"] == "survival_at"]["value"].min() > 1 - 1e-4
    random = [
        frame(Survival(), tuned(W, 1e4 * torch.randn(100, 90, generator=torch.Generator().manual_seed(s))))
        for s in range(20)
    ]
    mean = pd.concat(random).groupby(["metric", "side", "k"])[["value", "null"]].mean().loc["survival_at"]
    assert mean["value"].to_numpy() == pytest.approx(mean["null"].to_numpy(), rel=0.6, abs=0.02)


@pytest.mark.parametrize("analysis", [Alignment(), Intruders(), Survival()])
def test_updates_in_float64_are_taken_too(analysis):
    W, (B, A) = decaying(330, 300), factors(330, 300, 4)
    double, single = (frame(analysis, tuned(W, B.to(dtype), A.to(dtype))) for dtype in (torch.float64, torch.float32))
    assert double["value"].to_numpy() == pytest.approx(single["value"].to_numpy(), rel=1e-2, abs=1e-2, nan_ok=True)


def over_tasks(W, *deltas):
    base = decompose(W)
    subjects = [tuned(W, *delta) for delta in deltas]
    return [replace(each, base=base, layer=replace(each.layer, step=n)) for n, each in enumerate(subjects, 1)]


def counts(rows, metric, column="value"):
    return list(rows[rows["metric"] == metric].sort_values("step")[column])


@pytest.mark.parametrize("dense", [False, True])
def test_what_accumulates_is_that_of_dense_svds(dense):
    """At each step by the definition in float64, and how many of them the top 32 of the step before have not."""
    W = decaying(60, 40)
    pairs = [factors(60, 40, r, seed, 4.0) for seed, r in enumerate((2, 4, 6))]
    matrices = [B.double() @ A.double() for B, A in pairs]
    rows = to_table(
        Accumulation().compute(
            *over_tasks(W, *([m.float()] if dense else pair for m, pair in zip(matrices, pairs, strict=True)))
        ),
        {"layer": "l"},
    ).to_pandas()
    lefts = [np.linalg.svd((W.double() + m).numpy(), full_matrices=False)[0] for m in matrices]
    far = [dense_cosines(W, m, 10) < 0.5 for m in matrices]
    seen = [np.abs(a[:, :32].T @ b[:, :10]).max(0) >= 0.5 for a, b in pairwise(lefts)]
    assert counts(rows, "num_intruders") == [each.sum() for each in far] and far[-1].sum() > 2
    new = [far[0].sum(), *((each & ~known).sum() for each, known in zip(far[1:], seen, strict=True))]
    assert counts(rows, "num_new") == new and new[1] > 0


def test_each_task_adds_the_one_direction_that_it_learns():
    """Random orthonormal directions, one more after each, far larger than W0 and of sizes of their own."""
    W = torch.diag(0.9 ** torch.arange(64.0))
    spread = torch.linalg.qr(torch.randn(64, 3, generator=torch.Generator().manual_seed(3))).Q
    spread, A = spread * torch.tensor([11.0, 9.0, 7.0]), torch.eye(64)[:3]
    rows = to_table(
        Accumulation().compute(*over_tasks(W, *((spread[:, :n], A[:n]) for n in (1, 2, 3)))), {"layer": "l"}
    ).to_pandas()
    assert counts(rows, "num_intruders") == [1, 2, 3] == counts(rows, "num_intruders", "null")
    assert counts(rows, "num_new") == [1, 1, 1] and counts(rows, "growth") == [2] == counts(rows, "growth", "null")
    nothing = to_table(Accumulation().compute(*over_tasks(W, *2 * [(0 * spread, A)])), {"layer": "l"}).to_pandas()
    assert counts(nothing, "num_intruders") == counts(nothing, "num_new") == [0, 0]
