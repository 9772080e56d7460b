"""Trajectories whose answer is known: dense float64 linear algebra, a subspace that turns, a rank that rises."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.linalg import subspace_angles

from lorabench.analyses import dynamics
from lorabench.analyses.dynamics import Dynamics, first_lasting, inner_product
from lorabench.analyses.spectrum import Spectrum
from lorabench.linalg.decompose import thin_svd
from lorabench.spec.known import known_measures
from lorabench.spec.measures import Measure
from tests.analyses.test_analyses import frame, layer, random_layer
from tests.conftest import make_spec


def trajectory(*layers):
    """At the steps 10, 20, …"""
    return [replace(each, step=10 * number) for number, each in enumerate(layers, 1)]


def factored(U, sizes, V):
    return layer(U[:, : len(sizes)] * torch.tensor(sizes, dtype=U.dtype), V[:, : len(sizes)].mT)


def values(rows, metric):
    found = rows[rows["metric"] == metric]
    return dict(zip(found["step"], found["value"], strict=True))


def milestones(rows):
    found = rows[rows["step"].isna()]
    return dict(zip(found["metric"], found["value"], strict=True))


def orthonormal(d, k, seed):
    return torch.linalg.qr(torch.randn(d, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


@pytest.mark.parametrize("form", ["factors", "dense", "both"])
def test_the_direction_and_the_size_are_those_of_dense_matrices(form):
    """`both`: the rank of AdaLoRA may change on the way, and a form too."""
    layers = [random_layer(30, 20, rank, seed, torch.float64) for seed, rank in enumerate((3, 5, 4))]
    matrices = [each.update.dense().numpy() for each in layers]
    if form != "factors":
        dense = [layer(torch.from_numpy(matrix)) for matrix in matrices]
        layers = dense if form == "dense" else [dense[0], layers[1], dense[2]]
    rows = frame(Dynamics(), *trajectory(*layers))
    norms = [np.linalg.norm(matrix) for matrix in matrices]
    cosines = [(m * matrices[-1]).sum() / norm / norms[-1] for m, norm in zip(matrices, norms, strict=True)]
    assert list(values(rows, "cosine_final").values()) == pytest.approx(cosines, abs=1e-9)
    assert list(values(rows, "norm_share").values()) == pytest.approx([norm / norms[-1] for norm in norms])


def test_the_inner_product_of_large_matrices_is_summed_in_parts(monkeypatch):
    monkeypatch.setattr("lorabench.linalg.decompose._CHUNK_ROWS", 7)
    a, b = random_layer(30, 20, 3), random_layer(30, 20, 5, 1)
    want = pytest.approx((a.update.dense().double() * b.update.dense().double()).sum().item(), rel=1e-5)
    dense = [layer(each.update.dense()) for each in (a, b)]
    assert inner_product(a, b) == want and inner_product(*dense) == want
    assert inner_product(dense[0], b) == want and inner_product(a, dense[1]) == want


def test_kept_singular_vectors_tell_the_direction_only_where_they_are_all():
    whole = random_layer(30, 20, 4)
    kept = replace(whole, update=None)
    cut = replace(kept, svd=thin_svd(whole.update.B, whole.update.A, keep=2))
    assert inner_product(kept, kept) == pytest.approx(inner_product(whole, whole))
    assert inner_product(cut, whole) is None
    rows = frame(Dynamics(), *trajectory(cut, cut))
    assert rows[rows["metric"] == "cosine_final"]["value"].isna().all()
    assert values(rows, "norm_share")[10] == pytest.approx(1)


def test_similarity_is_that_of_the_top_directions_which_hold_90_percent():
    """φ(k, k) from scipy's angles: Σ cos² / k."""
    U, V = (orthonormal(40, 6, 0), orthonormal(40, 6, 1)), (orthonormal(30, 6, 2), orthonormal(30, 6, 3))
    first, last = factored(U[0], [5, 4, 3, 2, 1, 1], V[0]), factored(U[1], [3, 3, 3, 0.5, 0.4, 0.3], V[1])
    rows = frame(Dynamics(), *trajectory(first, last))
    for side, (a, b) in {"output": U, "input": V}.items():
        want = (np.cos(subspace_angles(a[:, :3].numpy(), b[:, :3].numpy())) ** 2).mean()
        assert values(rows, f"phi_final_{side}")[10] == pytest.approx(want)
        assert values(rows, f"phi_previous_{side}") == {20: pytest.approx(want)}
        assert values(rows, f"phi_final_{side}")[20] == pytest.approx(1)
        chance = rows[rows["metric"] == f"phi_final_{side}"]["null"]
        assert list(chance) == pytest.approx([3 / {"output": 40, "input": 30}[side]] * 2)
        assert (rows[rows["metric"] == f"phi_final_{side}"]["null_std"] > 0).all()


def test_fewer_directions_than_the_final_ones_may_lie_within_them():
    U, V = orthonormal(40, 4, 0), orthonormal(30, 4, 1)
    rows = frame(Dynamics(), *trajectory(factored(U, [1.0], V), factored(U, [1.0, 1.0, 1.0, 1.0], V)))
    assert values(rows, "phi_final_input")[10] == pytest.approx(1)
    assert values(rows, "norm_share")[10] == pytest.approx(0.5) == values(rows, "cosine_final")[10]


def test_the_spectrum_of_each_step_is_the_spectrum_analysis_s():
    layers = trajectory(*(random_layer(60, 50, 4, seed) for seed in range(3)))
    rows = frame(Dynamics(), *layers)
    for each in layers:
        mine = rows[rows["step"] == each.step].set_index("metric")
        want = frame(Spectrum(), each).set_index("metric")
        columns = ["value", "null", "null_std"]
        got = mine.loc[want.index, columns].astype(float)
        pd.testing.assert_frame_equal(got, want[columns].astype(float), check_categorical=False)


def test_a_subspace_that_turns_settles_when_it_stays():
    """By angles of 60°, 10°, 60°, 15° and 0: cos² is 0.25, 0.97, 0.25, 0.93, 1."""
    e, V = torch.eye(20, dtype=torch.float64), orthonormal(30, 1, 1)
    turned = [
        torch.cos(a) * e[:, :1] + torch.sin(a) * e[:, 1:2] for a in torch.deg2rad(torch.tensor([60.0, 10, 60, 15, 0]))
    ]
    rows = frame(Dynamics(), *trajectory(*(factored(u.double(), [1.0], V) for u in turned)))
    assert list(values(rows, "phi_final_output").values()) == pytest.approx([0.25, 0.9698, 0.25, 0.9330, 1], abs=1e-3)
    assert milestones(rows) == {"settled_step": 10, "settled_step_output": 40, "rank_rise_step": 10}


def test_a_rank_that_rises_has_risen_when_it_stays():
    U, V = orthonormal(40, 10, 0), orthonormal(30, 10, 1)
    rows = frame(Dynamics(), *trajectory(*(factored(U, [1.0] * rank, V) for rank in (2, 9, 8, 9, 10))))
    assert list(values(rows, "effective_rank_entropy").values()) == pytest.approx([2, 9, 8, 9, 10])
    assert milestones(rows)["rank_rise_step"] == 40


def test_a_zero_update_has_no_directions():
    zero, some = layer(torch.zeros(40, 2), torch.randn(2, 30)), random_layer(40, 30, 2)
    rows = frame(Dynamics(), *trajectory(zero, some, some))
    assert values(rows, "phi_final_input").keys() == {20, 30} == values(rows, "phi_final_output").keys()
    assert values(rows, "norm_share")[10] == 0 and np.isnan(values(rows, "cosine_final")[10])
    assert milestones(rows) == dict.fromkeys(Dynamics.per_layer, 20)
    ends = frame(Dynamics(), *trajectory(some, zero))
    assert ends[ends["step"].isna()]["value"].isna().all() and len(ends[ends["step"].isna()]) == 3


def test_random_snapshots_are_as_similar_as_chance():
    rows = [frame(Dynamics(), *trajectory(random_layer(60, 50, 4, s), random_layer(60, 50, 4, 1000 + s)))
            for s in range(60)]  # fmt: skip
    first = [each[(each["metric"] == "phi_final_input") & (each["step"] == 10)].iloc[0] for each in rows]
    assert np.mean([row["value"] for row in first]) == pytest.approx(np.mean([row["null"] for row in first]), rel=0.1)


def test_at_most_as_many_directions_as_the_subspace_analysis(monkeypatch):
    monkeypatch.setattr(dynamics, "MAX_DIRECTIONS", 3)
    rows = frame(Dynamics(), *trajectory(random_layer(60, 50, 8), random_layer(60, 50, 8, 1)))
    assert {*rows[rows["metric"] == "phi_final_input"]["null"].round(6)} == {3 / 50}


@pytest.mark.parametrize(
    ("series", "step"),
    [([0.95, 0.5, 0.9, 1], 3), ([1, 1], 1), ([0.1, 1], 2), ([None, 1], 2), ([1, None, 1], 3), ([1, 0.1], None)],
)
def test_first_lasting(series, step):
    assert first_lasting(list(enumerate(series, 1)), 0.9) == step


def test_every_metric_is_described_and_the_milestones_are_measures():
    rows = frame(Dynamics(), *trajectory(*(replace(random_layer(60, 50, 4, s), base_norm=2.0) for s in range(3))))
    assert {*Dynamics.metrics} - {*rows["metric"]} == {"noise_floor"}, "factors are exact"
    measures = known_measures([make_spec(snapshot_every=2)])
    found = {name: measure for name, measure in measures.items() if name.startswith("dynamics.")}
    assert found.keys() == {f"dynamics.{name}" for name in Dynamics.per_layer}
    assert all(isinstance(measure, Measure) and measure.unit == "steps" for measure in found.values())
    assert not any(name.startswith("dynamics.") for name in known_measures([make_spec()]))
