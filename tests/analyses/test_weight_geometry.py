"""profile, off_principal, sparsity, shared_changes and cosines, against float64 from the papers' definitions."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch

from lorabench.analyses.accumulation import Accumulation
from lorabench.analyses.cosines import SHOWN, Cosines
from lorabench.analyses.intruders import Intruders
from lorabench.analyses.off_principal import KS, OffPrincipal
from lorabench.analyses.profile import SAMPLE, Profile, directions
from lorabench.analyses.shared_changes import SharedChanges
from lorabench.analyses.sparsity import Sparsity
from lorabench.analysis.tidy import to_table
from lorabench.linalg.decompose import thin_svd
from lorabench.linalg.nulls import response_chance
from lorabench.updates import base as bases
from lorabench.updates.base import BaseLayer, Tuned, decompose
from lorabench.updates.layer import LayerSVD
from lorabench.updates.update import Update

ALPHA = 0.3
SHAPES = [(60, 40), (40, 60)]
ON_BASE = [Profile(), OffPrincipal(), Sparsity(), Cosines()]


def weight(M, N, seed=7, power=0.7):
    """A W0 with a spectrum as trained weights have it."""
    g = torch.Generator().manual_seed(seed)
    R = min(M, N)
    U, V = (torch.linalg.qr(torch.randn(d, R, generator=g)).Q for d in (M, N))
    return (U * torch.arange(1, R + 1) ** -power) @ V.mT


def tuned(W, B, A=None, keep=None):
    """`W`: a weight, or one that is decomposed already."""
    update = Update(parameter="model.layers.0.mlp.up_proj.weight", B=B, A=A)
    layer = LayerSVD(parameter=update.parameter, svd=thin_svd(B, A, keep=keep), update=update)
    return Tuned(layer=layer, base=W if isinstance(W, BaseLayer) else decompose(W))


def factors(M, N, r, seed=1, size=1.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(M, r, generator=g) * (size / M**0.5), torch.randn(r, N, generator=g) / N**0.5


def dense(B, A=None):
    return (B if A is None else B.double() @ A.double()).double().numpy()


def svd(matrix):
    U, S, Vh = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return U, S, Vh.T


def frame(analysis, *subjects):
    return to_table(analysis.compute(*subjects), {}).to_pandas()


def value(rows, metric, column="value", **where):
    for key, wanted in where.items():
        rows = rows[rows[key] == wanted]
    (found,) = rows[rows["metric"] == metric][column]
    return found


def curve(rows, metric, side, column="value"):
    return rows[(rows["metric"] == metric) & (rows["side"] == side)][column].to_numpy()


# profile


@pytest.mark.parametrize("shape", [*SHAPES, (330, 300), (300, 330)])
@pytest.mark.parametrize("keep", [None, 64])
def test_the_profile_is_that_of_dense_matrices(shape, keep):
    """Of factors; of a dense ΔW, of which the larger keeps some vectors; and of W0's vectors kept in float16."""
    W, (B, A) = weight(*shape), factors(*shape, 6)
    extra = torch.randn(*shape, generator=torch.Generator().manual_seed(3)) / 50
    subject = tuned(W, B, A) if keep is None else tuned(W, B @ A + extra, keep=keep)
    delta = dense(B, A) if keep is None else dense(subject.layer.update.B)
    U, S, V = svd(W)
    rows = frame(Profile(), subject)
    firsts, lasts, chosen = directions(len(S))
    assert lasts[-1] == len(S) and max(map(len, chosen)) <= SAMPLE
    own = np.abs(np.einsum("mi,mn,ni->i", U, W.double().numpy() + delta, V) - S)
    wanted = {
        ("response", "input"): np.linalg.norm(delta @ V, axis=0),
        ("response", "output"): np.linalg.norm(delta.T @ U, axis=0),
        ("diagonal", "both"): own,
    }
    for (metric, side), values in wanted.items():
        means = [np.square(values[each]).mean() ** 0.5 for each in chosen]
        assert curve(rows, metric, side) == pytest.approx(means, rel=1e-2, abs=1e-3 * values.mean())
    assert set(rows["first"]) == set(firsts)


def test_half_octaves_cover_every_direction_once():
    for count in (1, 2, 3, 5, 17, 96, 4096):
        firsts, lasts, chosen = directions(count)
        assert (firsts[0], lasts[-1]) == (1, count) and (firsts[1:] == lasts[:-1] + 1).all()
        for first, last, each in zip(firsts, lasts, chosen, strict=True):
            assert each[0] == first - 1 and each[-1] == last - 1 and len(each) == min(SAMPLE, last - first + 1)
            assert (np.diff(each) > 0).all()


@pytest.mark.parametrize("r", [1, 6])
@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_random_updates_answer_as_the_null_says(side, r):
    """Mean, standard deviation and mean square over draws of the whole update."""
    M, N, S, counts = 24, 30, np.arange(r, 0, -1.0), np.array([1, 8])
    random = np.random.default_rng(0)
    draws = []
    for _ in range(500):
        U, V = (np.linalg.qr(random.normal(size=(d, r)))[0] for d in (M, N))
        delta = (U * S) @ V.T
        squares = {
            "input": np.square(delta).sum(0),
            "output": np.square(delta).sum(1),
            "both": np.square(delta.diagonal()),
        }[side]
        draws.append([squares[:n].mean() ** 0.5 for n in counts])
    mean, std = response_chance(S, M, N, counts, side)
    assert np.mean(draws, 0) == pytest.approx(mean, rel=0.1)
    assert np.std(draws, 0) == pytest.approx(std, rel=0.2)
    assert np.square(draws).mean(0) == pytest.approx(mean**2 + std**2, rel=0.2)


def test_an_update_inside_w0s_top_answers_there_alone():
    W = weight(60, 50)
    U, S, V = (torch.from_numpy(part).float() for part in svd(W))
    rows = frame(Profile(), tuned(W, U[:, :3] * S[:3], V[:, :3].mT))
    for side in ("input", "output", "both"):
        metric = "diagonal" if side == "both" else "response"
        assert curve(rows, metric, side)[:3] == pytest.approx(S[:3].numpy(), rel=1e-4)
        assert curve(rows, metric, side)[3:].max() < 1e-5
        assert (curve(rows, metric, side)[:3] > 2.5 * curve(rows, metric, side, "null")[:3]).all()


def test_an_update_of_the_null_space_answers_nowhere():
    """What W0 does not read: its right null space."""
    W = weight(30, 60)
    outside = torch.from_numpy(scipy.linalg.null_space(W.double().numpy())).float()
    rows = frame(Profile(), tuned(W, torch.randn(30, 2, generator=torch.Generator().manual_seed(0)), outside[:, :2].mT))
    assert curve(rows, "response", "input").max() < 1e-5 and curve(rows, "diagonal", "both").max() < 1e-5
    assert curve(rows, "response", "output").min() > 0


def test_directions_that_w0_does_not_have_are_left_out():
    U, S, V = (torch.from_numpy(part).float() for part in svd(weight(40, 50)))
    rows = frame(Profile(), tuned((U[:, :5] * S[:5]) @ V[:, :5].mT, *factors(40, 50, 2)))
    assert rows["last"].max() == 5


# off_principal


@pytest.mark.parametrize("shape", [*SHAPES, (230, 200)])
@pytest.mark.parametrize("size", [1e-3, 0.3])
@pytest.mark.parametrize("keep", [None, 16])
def test_off_principal_is_that_of_dense_svds(shape, size, keep):
    W, (B, A) = weight(*shape), factors(*shape, 4, size=size)
    bulk = size * torch.randn(*shape, generator=torch.Generator().manual_seed(3)) / 20
    subject = tuned(W, B, A) if keep is None else tuned(W, B @ A + bulk, keep=keep)
    (U0, S0, V0), (U, S, V) = svd(W), svd(W.double().numpy() + subject.delta().double().numpy())
    rows = frame(OffPrincipal(), subject)
    norm = np.linalg.norm
    assert value(rows, "spectral_shift") == pytest.approx(norm(S - S0) / norm(S0), rel=1e-3)
    assert set(rows["k"]) == {*KS, min(shape)}
    for k in KS:
        shift = norm(S[:k] - S0[:k]) / norm(S0[:k])
        assert value(rows, "spectral_shift_at", k=k) == pytest.approx(shift, rel=1e-2, abs=1e-6)
        for side, before, after in (("input", V0, V), ("output", U0, U)):
            angles = scipy.linalg.subspace_angles(before[:, :k], after[:, :k])
            assert value(rows, "angle_largest", side=side, k=k) == pytest.approx(angles.max(), rel=1e-2, abs=2e-5)
            assert value(rows, "angle_mean", side=side, k=k) == pytest.approx(angles.mean(), rel=1e-2, abs=2e-5)
        left, right = U0[:, :k].T @ U[:, :k], V0[:, :k].T @ V[:, :k]
        gap = norm(left - right) / (norm(left) ** 2 + norm(right) ** 2) ** 0.5
        assert value(rows, "rotation_gap_at", k=k) == pytest.approx(gap, rel=2e-2, abs=2e-5)
    assert value(rows, "rotation", side="input") == value(rows, "angle_mean", side="input", k=32)
    assert value(rows, "rotation_gap") == value(rows, "rotation_gap_at", k=32)


def test_scaling_w0_shifts_its_spectrum_and_turns_nothing():
    W = weight(50, 40)
    U, S, V = (torch.from_numpy(part).float() for part in svd(W))
    rows = frame(OffPrincipal(), tuned(W, U * (0.1 * S), V.mT))
    assert value(rows, "spectral_shift") == pytest.approx(0.1, rel=1e-4)
    assert rows[rows["metric"].str.startswith(("angle", "rotation"))]["value"].max() < 1e-4


def test_turning_both_sides_alike_shifts_nothing_and_has_no_gap():
    """W = (Q U) S (P V)ᵀ with one small rotation for both sides, in the coordinates of singular vectors."""
    W = weight(40, 40)
    U, S, V = svd(W)
    K = np.random.default_rng(0).normal(size=(40, 40))
    Q = scipy.linalg.expm(0.05 * (K - K.T))
    other = scipy.linalg.expm(0.05 * (K.T - K))
    for second, alike in ((Q, True), (other, False)):
        after = (U @ Q * S) @ (V @ second).T
        rows = frame(OffPrincipal(), tuned(W, torch.from_numpy(after).float() - W))
        assert value(rows, "spectral_shift") < 1e-5 and value(rows, "rotation", side="input") > 0.05
        assert (value(rows, "rotation_gap") < 1e-4) == alike


def test_large_matrices_on_a_cpu_have_no_whole_spectrum(monkeypatch):
    monkeypatch.setattr(bases, "LARGE", 30)
    monkeypatch.setattr(bases, "best_device", lambda shape: torch.device("cpu"))
    subject = tuned(weight(50, 40), *factors(50, 40, 2))
    assert "spectral_shift" not in {*frame(OffPrincipal(), subject)["metric"]}
    assert "visible_rank" not in {*frame(Sparsity(), subject)["metric"]}


# sparsity and shared_changes


def masks(W, delta):
    """The sets of the papers, entry by entry: changed by the relative criterion, largest, principal, smallest."""
    before, after = (each.bfloat16().double().numpy() for each in (W, W + delta))
    changed = np.abs(after - before) > 1e-3 * np.maximum(np.abs(before), np.abs(after))
    size = round(ALPHA * W.numel())

    def top(values):
        return np.argsort(-values.ravel(), kind="stable")[:size]

    U, S, V = svd(W)
    k = max(1, min(W.shape) // 16)
    return (
        set(np.flatnonzero(changed)),
        set(top(np.abs(delta.double().numpy()))),
        set(top(np.abs((U[:, :k] * S[:k]) @ V[:, :k].T))),
        set(top(-np.abs(W.double().numpy()))),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-3, 1e-1])
def test_sparsity_is_counted_as_the_papers_count(shape, size):
    W, (B, A) = weight(*shape), factors(*shape, 4, size=size)
    B[:5] = 0
    rows = frame(Sparsity(), tuned(W, B, A))
    changed, largest, principal, smallest = masks(W, B @ A)
    n, visible = W.numel(), (W + B @ A).bfloat16().double() - W.bfloat16().double()
    assert value(rows, "changed") == len(changed) / n
    assert value(rows, "zero") == 5 / shape[0] and value(rows, "zero", "null") == 0
    assert value(rows, "changed") + value(rows, "hidden") + value(rows, "zero") == pytest.approx(1)
    assert value(rows, "visible_rank") == np.linalg.matrix_rank(visible.float().numpy()) / min(shape)
    for name, chosen in (("changed", changed), ("largest", largest)):
        for other, marks in (("principal", principal), ("smallest", smallest)):
            share = len(chosen & marks) / len(chosen)
            assert value(rows, f"{name}_in_{other}") == pytest.approx(share, abs=2 / len(chosen))


def test_what_bfloat16_hides_does_not_count():
    """Half a spacing and more is seen, less is not; an update of rank one is seen with a higher one."""
    W = torch.full((8, 6), 1.0)
    for delta, share in ((2.0**-9, 0.0), (2.0**-7, 1.0), (-(2.0**-10), 0.0), (-(2.0**-7), 1.0)):
        rows = frame(Sparsity(), tuned(W, torch.full((8, 6), delta)))
        assert value(rows, "changed") == share and value(rows, "hidden") == 1 - share
    W, (B, A) = weight(80, 60), factors(80, 60, 1, size=1e-3)
    rows = frame(Sparsity(), tuned(W, B, A))
    assert value(rows, "changed") < 0.5 and value(rows, "visible_rank") > 0.9
    rows = frame(Sparsity(), tuned(W, 0 * B, A))
    assert value(rows, "zero") == 1 and "changed_in_principal" not in {*rows["metric"]}


def test_planted_changes_are_principal_or_smallest():
    W = weight(64, 48)
    *_, principal, smallest = masks(W, torch.zeros_like(W))
    for marks, metric in ((principal, "principal"), (smallest, "smallest")):
        delta = torch.zeros(W.numel())
        delta[sorted(marks)] = 1.0
        rows = frame(Sparsity(), tuned(W, delta.view_as(W)))
        for name in ("changed", "largest"):
            assert value(rows, f"{name}_in_{metric}") == pytest.approx(1, abs=1e-2)


def test_two_runs_share_what_both_change():
    W, a, b = weight(60, 50), factors(60, 50, 4, 1, 1e-2), factors(60, 50, 4, 2, 3e-3)
    base = decompose(W)
    first, second = tuned(base, *a), tuned(base, *b)
    (changed_a, largest_a, *_), (changed_b, largest_b, *_) = masks(W, a[0] @ a[1]), masks(W, b[0] @ b[1])
    rows, both = frame(SharedChanges(), first, second), len(changed_a & changed_b)
    assert value(rows, "changed_a_in_b") == both / len(changed_a)
    assert value(rows, "changed_b_in_a") == both / len(changed_b)
    assert value(rows, "expected_a_in_b") == len(changed_b) / W.numel()
    assert value(rows, "expected_b_in_a") == len(changed_a) / W.numel()
    share = len(largest_a & largest_b) / len(largest_a)
    assert value(rows, "largest") == pytest.approx(share, abs=2e-3)
    assert value(rows, "largest", "null") == pytest.approx(ALPHA, abs=1e-3)
    same = frame(SharedChanges(), first, first).set_index("metric")["value"]
    assert (same[["changed_a_in_b", "changed_b_in_a", "largest"]] == 1).all()
    nothing = tuned(base, 0 * b[0], b[1])
    assert frame(SharedChanges(), first, nothing).set_index("metric").loc["changed_a_in_b", "value"] == 0
    assert not SharedChanges().compute(nothing, nothing)


def test_two_disjoint_updates_share_nothing():
    W, eye = weight(20, 20), torch.eye(20)
    base = decompose(W)
    a, b = tuned(base, eye[:, :3], eye[:3]), tuned(base, eye[:, 3:6], eye[3:6])
    assert frame(SharedChanges(), a, b).set_index("metric").loc[["changed_a_in_b", "largest"], "value"].max() == 0


# all of them


def place(rows):
    return [name for name in rows if name not in ("value", "null", "null_std", "cosine")]


def at_random(base, S, seed):
    """ΔW with these singular values in directions that no null has."""
    g = torch.Generator().manual_seed(100 + seed)
    U, V = (torch.linalg.qr(torch.randn(d, len(S), generator=g)).Q for d in base.weight.shape)
    return tuned(base, U * S, V.mT)


RANDOM = {OffPrincipal: 0.01, Sparsity: 0.01, SharedChanges: 0.01, Intruders: 0.2, Cosines: 0.2, Accumulation: 0.2}
"""Analysis whose null is drawn -> a size of ΔW at which it is neither nothing nor all."""


@pytest.mark.parametrize("analysis", [each() for each in RANDOM], ids=lambda each: each.name)
def test_random_updates_lie_in_the_printed_band(analysis):
    """Values and null are of one distribution: their means agree to 5 standard errors, and about as many of the values
    are beyond 2 null_std as of Student's t with 7 degrees of freedom, 9%."""
    base, S, num = decompose(weight(48, 40)), RANDOM[type(analysis)] * torch.arange(4, 0, -1), 16
    draws = []
    for seed in range(num):
        subjects = [at_random(base, S, seed)]
        if analysis.is_of_pairs():
            subjects.append(at_random(base, S, 50 + seed))
        if analysis.is_over_training():
            steps = [at_random(base, part * S, seed) for part in (0.3, 0.6, 1.0)]
            subjects = [replace(each, layer=replace(each.layer, step=n)) for n, each in enumerate(steps)]
        draws.append(frame(analysis, *subjects))
    rows = pd.concat(draws).dropna(subset="null").rename(columns={"cosine": "value"})
    keys = [key for key in rows if key not in ("value", "null", "null_std", "num_degenerate")]
    groups = rows.groupby(keys, observed=True, dropna=False)
    mean, var, null, std = (
        groups["value"].mean(),
        groups["value"].var(),
        groups["null"].mean(),
        groups["null_std"].mean(),
    )
    error = np.sqrt(var / num + np.square(std) / bases.DRAWS)
    assert (np.abs(mean - null) <= 5 * error + 1e-6).all() and (error > 0).mean() > 0.7
    banded = rows[rows["null_std"] > 0]
    assert 0.03 < (np.abs(banded["value"] - banded["null"]) > 2 * banded["null_std"]).mean() < 0.2


def test_random_updates_lie_in_the_band_of_the_profile():
    base, outside = decompose(weight(48, 40)), []
    for seed in range(16):
        g = torch.Generator().manual_seed(100 + seed)
        U, V = (torch.linalg.qr(torch.randn(d, 4, generator=g)).Q for d in (48, 40))
        rows = frame(Profile(), tuned(base, U * torch.arange(4, 0, -1), V.mT))
        outside.append((np.abs(rows["value"] - rows["null"]) > 2 * rows["null_std"]).to_numpy())
    assert 0.01 < np.mean(outside) < 0.09


@pytest.mark.parametrize("analysis", ON_BASE)
def test_nothing_depends_on_signs_or_on_turned_coordinates(analysis):
    """Permuted rows and columns of W0 and ΔW, and both with their signs turned."""
    W, (B, A) = weight(40, 30), factors(40, 30, 3, size=0.1)
    g = torch.Generator().manual_seed(5)
    rows, columns = torch.randperm(40, generator=g), torch.randperm(30, generator=g)
    first = frame(analysis, tuned(W, B, A))
    other = frame(analysis, tuned(-W[rows][:, columns], -B[rows], A[:, columns]))
    column = "cosine" if "cosine" in first else "value"
    assert first[column].to_numpy() == pytest.approx(other[column].to_numpy(), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("analysis", [Profile(), OffPrincipal(), Cosines()])
def test_a_zero_update_has_no_rows(analysis):
    assert analysis.compute(tuned(weight(20, 20), torch.zeros(20, 2), torch.zeros(2, 20))) == []


@pytest.mark.parametrize("analysis", ON_BASE)
def test_updates_in_float64_are_taken_too(analysis):
    W, (B, A) = weight(90, 70), factors(90, 70, 4)
    double, single = (frame(analysis, tuned(W, B.to(dtype), A.to(dtype))) for dtype in (torch.float64, torch.float32))
    column = "cosine" if "cosine" in double else "value"
    assert double[column].to_numpy() == pytest.approx(single[column].to_numpy(), rel=1e-2, abs=1e-3)


def test_the_picture_is_the_cosines_of_dense_svds():
    W, (B, A) = weight(60, 50, power=0.3), factors(60, 50, 1, size=30)
    rows = frame(Cosines(), tuned(W, B, A))
    cosines = np.abs(svd(W)[0].T @ svd(W.double().numpy() + dense(B, A))[0][:, :SHOWN])
    table = rows.pivot(index="i", columns="j", values="cosine").to_numpy()
    assert table[1:] == pytest.approx(cosines[:SHOWN], abs=1e-4)
    assert table[0] == pytest.approx(cosines[SHOWN:].max(0), abs=1e-4)
    assert table[:, 0].max() < 0.5, "a new strong direction is a blank column"
