"""Each analysis on layers whose answer is known; every one in the registry on its smallest input."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch

from lorabench.analyses.angles import Angles
from lorabench.analyses.factors import Factors
from lorabench.analyses.overlap import Overlap
from lorabench.analyses.singular_values import SingularValues
from lorabench.analyses.spectrum import Spectrum, rounding_norm
from lorabench.analyses.subspace import MAX_DIRECTIONS, Subspace
from lorabench.analysis.tidy import to_table
from lorabench.config import plugins
from lorabench.linalg.decompose import ThinSVD, thin_svd
from lorabench.updates.base import Tuned, decompose
from lorabench.updates.layer import LayerSVD
from lorabench.updates.update import Update


def layer(B, A=None, **options):
    rank = None if A is None else B.shape[1]
    name = "model.layers.0.mlp.up_proj.weight"
    return LayerSVD(parameter=name, svd=thin_svd(B, A), rank=rank, update=Update(parameter=name, B=B, A=A), **options)


def random_layer(M, N, r, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return layer(torch.randn(M, r, generator=g, dtype=dtype), torch.randn(r, N, generator=g, dtype=dtype))


MOVEMENT = {"moved_A": 0.1, "relative_A": 0.2, "relative_A_null": 1.4, "cosine_A": 0.9, "cosine_A_null_std": 0.1}
DRIFT = {"task": 0.02, "task_null": 0.01, "task_null_std": 0.002, "retain": 0.03, "retain_null": 0.02}
GRADIENTS = {name: random_layer(9, 7, 3, seed).svd for seed, name in enumerate(("task", "retain"), 5)}


def frame(analysis, *layers):
    return to_table(analysis.compute(*layers), {"layer": "l"}).to_pandas()


def smallest(analysis):
    """What an analysis is called with, made of tiny random layers."""
    layers = [
        replace(random_layer(9, 7, 2, seed), drift=DRIFT, movement=MOVEMENT, gradients=GRADIENTS) for seed in range(2)
    ]
    match analysis.needs:
        case "layer":
            return layers[:1]
        case "base":
            return [Tuned(layer=layers[0], base=decompose(torch.randn(9, 7)))]
        case "base_pair":
            base = decompose(torch.randn(9, 7))
            return [Tuned(layer=layer, base=base) for layer in layers]
        case "trajectory":
            return [replace(layer, step=step) for step, layer in enumerate(layers, 1)]
        case "base_trajectory":
            base = decompose(torch.randn(9, 7))
            return [Tuned(layer=replace(layer, step=step), base=base) for step, layer in enumerate(layers, 1)]
    return layers


@pytest.mark.parametrize("name", plugins.names("analyses"))
def test_every_analysis_gives_a_table_and_describes_itself(name):
    analysis = plugins.example("analyses", name)
    table = frame(analysis, *smallest(analysis))
    assert len(table) > 1 and not table.isna().all().all()
    assert plugins.describe("analyses")[name].endswith(".")
    if "metric" in table:
        assert {*table["metric"]} <= {*analysis.metrics}


def test_spectrum_of_a_random_factored_update_is_its_null():
    rows = pd.concat(frame(Spectrum(), random_layer(60, 50, 64, seed)) for seed in range(8))
    mean = rows.groupby("metric")[["value", "null"]].mean()
    for metric in ("rank_50", "rank_90", "effective_rank_entropy", "stable_rank", "nuclear_norm", "spectral_norm"):
        assert mean.loc[metric, "value"] == pytest.approx(mean.loc[metric, "null"], rel=0.05)


def test_spectrum_of_a_random_dense_update_is_its_null():
    W = torch.randn(200, 150, generator=torch.Generator().manual_seed(0))
    rows = frame(Spectrum(), layer(W, base_norm=10.0, precision="float32")).set_index("metric")
    for metric in ("rank_90", "effective_rank_entropy", "stable_rank", "nuclear_norm", "spectral_norm"):
        assert rows.loc[metric, "value"] == pytest.approx(rows.loc[metric, "null"], rel=0.04)
        assert abs(rows.loc[metric, "value"] - rows.loc[metric, "null"]) < 4 * rows.loc[metric, "null_std"]
    assert rows.loc["relative_norm", "value"] == pytest.approx(W.norm().item() / 10)
    assert {*Spectrum.metrics} == {*rows.index}


def test_a_strong_direction_stands_out_from_the_null():
    torch.manual_seed(0)
    B, A = torch.randn(60, 8) * torch.tensor([10.0] + 7 * [1.0]), torch.randn(8, 50)
    rows = frame(Spectrum(), layer(B, A)).set_index("metric")
    assert rows.loc["rank_90", "value"] == 1 < rows.loc["rank_90", "null"]
    assert "noise_floor" not in rows.index, "factors are exact"
    assert "relative_norm" not in rows.index, "‖W0‖ is not known"


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
def test_noise_floor_is_the_norm_of_rounding(precision):
    """Over the scales of one octave; at a single one it is within 10%."""
    W = torch.randn(200, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.02
    scaled = [W * 2 ** (k / 8) for k in range(8)]
    errors = np.array([((w.to(getattr(torch, precision)).double() - w).norm() / w.norm()).item() for w in scaled])
    expected = rounding_norm(1.0, precision)
    assert np.square(errors).mean() ** 0.5 == pytest.approx(expected, rel=0.01)
    assert errors == pytest.approx(np.full(8, expected), rel=0.1)


def test_noise_floor_warns_of_rank_that_is_only_rounding():
    """A rank-8 change of 1e-3 of the norm, as a difference of bfloat16 weights, reads as a high rank."""
    g = torch.Generator().manual_seed(0)
    W, (B, A) = torch.randn(128, 128, generator=g), (torch.randn(128, 8, generator=g), torch.randn(8, 128, generator=g))
    W = W.bfloat16().float()
    delta = B @ A * (1e-3 * W.norm() / (B @ A).norm())
    values = {}
    for precision in ("bfloat16", "float32"):
        stored = (W + delta).to(getattr(torch, precision)).float() - W
        rows = frame(Spectrum(), layer(stored, base_norm=W.norm().item(), precision=precision)).set_index("metric")
        values[precision] = rows["value"]
    assert values["float32"]["rank_90"] <= 8 and values["float32"]["noise_floor"] ** 2 < 1e-6
    assert values["bfloat16"]["rank_90"] > 30 and values["bfloat16"]["noise_floor"] ** 2 > 0.1


def test_singular_values_of_a_diagonal():
    rows = frame(SingularValues(), layer(torch.diag(torch.tensor([2.0, 5.0, 1.0]))))
    assert list(rows["value"]) == pytest.approx([5, 2, 1]) and list(rows["index"]) == [1, 2, 3]
    assert np.linalg.norm(rows["null"]) == pytest.approx(30**0.5) and rows["null"].is_monotonic_decreasing


def grid(rows, side="input", column="phi"):
    return rows[rows["side"] == side].pivot(index="i", columns="j", values=column).to_numpy()


def test_similarity_with_itself_and_with_orthogonal_directions():
    one = random_layer(30, 20, 4)
    assert grid(frame(Subspace(), one, one)).diagonal() == pytest.approx(np.ones(4), abs=1e-5)
    eye = torch.eye(20)
    first, second = layer(eye[:, :3], eye[:3]), layer(eye[:, 3:8], eye[5:10])
    rows = frame(Subspace(), first, second)
    assert rows["phi"].max() < 1e-10 and grid(rows).shape == (3, 5)


def test_sides_are_not_swapped():
    """Both updates read the same inputs and write to different outputs."""
    eye = torch.eye(20)
    a, b = layer(eye[:, :3], eye[:3, :12]), layer(eye[:, 5:8], eye[:3, :12])
    rows = frame(Subspace(), a, b)
    assert grid(rows, "input")[-1, -1] == pytest.approx(1) and grid(rows, "output")[-1, -1] == pytest.approx(0)
    chance = {side: grid(rows, side, "chance")[0, 0] for side in ("input", "output")}
    assert chance == pytest.approx({"input": 1 / 12, "output": 1 / 20})


def test_random_updates_are_as_similar_as_chance():
    draws = np.array([grid(frame(Subspace(), random_layer(40, 30, 4, s), random_layer(40, 30, 6, 1000 + s)))
                      for s in range(200)])  # fmt: skip
    rows = frame(Subspace(), random_layer(40, 30, 4), random_layer(40, 30, 6, 1))
    error = grid(rows, column="chance_std") / 200**0.5
    assert (np.abs(draws.mean(0) - grid(rows, column="chance")) < 4.5 * error).all()


def test_directions_beyond_the_numerical_rank_are_left_out():
    B, A = torch.randn(40, 2), torch.randn(2, 30)
    doubled, zero = layer(torch.cat([B, B], 1), torch.cat([A, A])), layer(torch.zeros(40, 4), torch.randn(4, 30))
    assert grid(frame(Subspace(), doubled, random_layer(40, 30, 4))).shape == (2, 4)
    assert {*frame(Angles(), doubled, random_layer(40, 30, 4))["dim_a"]} == {2}
    assert Subspace().compute(zero, doubled) == Subspace().compute(doubled, zero) == Angles().compute(zero, zero) == []


def test_the_grid_is_bounded_by_64_and_by_the_kept_vectors():
    large = random_layer(100, 90, 80)
    few = LayerSVD(parameter="w", svd=ThinSVD(U=large.svd.U[:, :3], S=large.svd.S, Vh=large.svd.Vh[:3]))
    assert grid(frame(Subspace(), large, few)).shape == (MAX_DIRECTIONS, 3)


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(9, 7\) and \(7, 9\)"):
        Subspace().compute(random_layer(9, 7, 2), random_layer(7, 9, 2))


def test_angles_of_identical_and_orthogonal_updates():
    one = random_layer(30, 20, 4, dtype=torch.float64)
    same = frame(Angles(), one, one)
    assert same["angle"].max() < 1e-12 and same["grassmann"].max() < 1e-12 and (same["angle_chance"] > 0.3).all()
    eye = torch.eye(20)
    rows = frame(Angles(), layer(eye[:, :3], eye[:3]), layer(eye[:, 3:8], eye[5:10]))
    assert rows["angle"].to_numpy() == pytest.approx(np.full(6, np.pi / 2))
    assert rows["grassmann"].to_numpy() == pytest.approx(np.full(6, 3**0.5 * np.pi / 2))


def test_angles_of_random_updates_are_as_chance():
    rows = pd.concat(frame(Angles(), random_layer(40, 30, 3, s), random_layer(40, 30, 5, 1000 + s)) for s in range(60))
    mean = rows.groupby(["side", "index"])[["angle", "angle_chance"]].mean()
    assert mean["angle"].to_numpy() == pytest.approx(mean["angle_chance"].to_numpy(), abs=0.08)


def overlap(a, b, column="value"):
    return frame(Overlap(), a, b).set_index(["side", "metric"])[column]


def test_overlap_is_that_of_dense_projections_and_scipys_angles():
    W = {}
    for name, r in (("a", 3), ("b", 6)):
        W[name] = [X.double().numpy() for X in (torch.randn(40, r), torch.randn(r, 30))]
    W["b"][0][:, :2] += W["a"][0][:, :2]
    a, b = (layer(*map(torch.from_numpy, factors)) for factors in W.values())
    dense = {name: B @ A for name, (B, A) in W.items()}
    found = overlap(a, b)
    for side, turn in (("output", lambda X: X), ("input", lambda X: X.T)):
        bases = {name: scipy.linalg.orth(turn(X)) for name, X in dense.items()}
        cosines = np.cos(scipy.linalg.subspace_angles(bases["a"], bases["b"]))
        assert found[side, "phi_full"] == pytest.approx(np.square(cosines).mean())
        for one, other in ("ab", "ba"):
            inside = bases[other].T @ turn(dense[one])
            share = np.linalg.norm(inside) ** 2 / np.linalg.norm(dense[one]) ** 2
            assert found[side, f"energy_{one}_in_{other}"] == pytest.approx(share)
        tops = [np.linalg.svd(turn(X))[0][:, 0] for X in dense.values()]
        assert found[side, "phi_first"] == pytest.approx((tops[0] @ tops[1]) ** 2)
    assert found["output", "p_value"] < 0.05


def test_overlap_of_the_same_and_of_orthogonal_updates():
    one = random_layer(60, 50, 4, dtype=torch.float64)
    same = overlap(one, one)
    assert same.drop("p_value", level="metric").to_numpy() == pytest.approx(np.ones(8))
    assert same.xs("p_value", level="metric").to_numpy() == pytest.approx(np.full(2, 1e-4))
    eye = torch.eye(20)
    apart = overlap(layer(eye[:, :3], eye[:3]), layer(eye[:, 3:8], eye[5:10]))
    assert apart.drop("p_value", level="metric").max() < 1e-10


def test_overlap_of_random_updates_is_chance():
    pairs = [(random_layer(40, 30, 4, s), random_layer(40, 30, 6, 1000 + s)) for s in range(200)]
    rows = pd.concat(frame(Overlap(), *pair) for pair in pairs)
    assert {*rows["metric"]} == {*Overlap.metrics} - {"p_value_corrected"}, "which is over layers"
    groups = rows[rows["metric"] != "p_value"].groupby(["side", "metric"])
    mean, std, null = groups["value"].mean(), groups["value"].std(), groups["null"].first()
    assert (np.abs(mean - null) < 4.5 * std / 200**0.5).all()
    assert groups["null_std"].mean().to_numpy() == pytest.approx(std.to_numpy(), rel=0.25)


def test_p_values_are_corrected_over_the_layers_of_each_pair():
    """Rows of two pairs of runs, as the engine joins them; each stands after its own p-value."""
    pairs = {("a", "b"): [0.001, 0.02, 0.9], ("a", "c"): [0.03, 0.04]}
    rows = [
        {
            "run_a": a,
            "run_b": b,
            "layer": f"l{k}",
            "side": "input",
            "metric": metric,
            "value": p if metric != "phi" else 1,
        }
        for (a, b), values in pairs.items()
        for k, p in enumerate(values)
        for metric in ("phi", "p_value")
    ]
    words = ("run_a", "run_b", "metric")
    before = pd.DataFrame(rows).astype(dict.fromkeys(words, "category"))
    found = Overlap().over_layers(before)
    assert {*found.columns} == {*before.columns} and isinstance(found["metric"].dtype, pd.CategoricalDtype)
    assert [*found["metric"]] == ["phi", "p_value", "p_value_corrected"] * 5
    mine = found[found["metric"] == "p_value_corrected"]
    assert [*mine["value"]] == pytest.approx([0.003, 0.03, 0.9, 0.04, 0.04])
    assert [*mine["layer"]] == ["l0", "l1", "l2", "l0", "l1"] and found[found["metric"] == "phi"]["value"].eq(1).all()
    nothing = before[before["metric"] == "phi"]
    assert len(Overlap().over_layers(nothing)) == len(nothing)


def test_overlap_of_a_dense_update_counts_all_its_energy_and_keeps_64_directions():
    g = torch.Generator().manual_seed(0)
    W, (B, A) = torch.randn(100, 90, generator=g), (torch.randn(100, 2, generator=g), torch.randn(2, 90, generator=g))
    svd = thin_svd(W, keep=MAX_DIRECTIONS)
    dense = LayerSVD(parameter="w", svd=svd, update=Update(parameter="w", B=W))
    found, null = overlap(dense, layer(B, A)), overlap(dense, layer(B, A), "null")
    Q = np.linalg.qr(B.numpy())[0]
    share = np.linalg.norm(Q.T @ W.numpy()) ** 2 / np.linalg.norm(W.numpy()) ** 2
    assert found["output", "energy_a_in_b"] == pytest.approx(share, rel=1e-4)
    assert null["output", "energy_b_in_a"] == MAX_DIRECTIONS / 100
    kept = overlap(LayerSVD(parameter="w", svd=svd), layer(B, A))
    assert ("output", "energy_b_in_a") in kept.index and ("output", "energy_a_in_b") not in kept.index


def test_overlap_spans_more_than_64_directions_where_the_rank_does():
    large = random_layer(100, 90, 80)
    assert overlap(large, large)["input", "energy_a_in_b"] == pytest.approx(1, abs=1e-5)
    assert overlap(large, large, "null")["input", "energy_a_in_b"] == pytest.approx(80 / 90)


def test_factors_are_alike_where_the_start_or_what_is_written_is():
    g = torch.Generator().manual_seed(0)
    A, B, C = torch.randn(3, 50, generator=g), torch.randn(40, 3, generator=g), torch.randn(40, 3, generator=g)
    K = torch.randn(3, 3, generator=g)
    one_start = frame(Factors(), layer(B, A), layer(C, A)).set_index("metric")["value"]
    assert one_start[["similarity_A", "cosine_A"]].to_numpy() == pytest.approx(1) and one_start["cosine_B"] < 0.5
    turned = frame(Factors(), layer(B, A), layer(-B @ K, torch.linalg.solve(K, A))).set_index("metric")["value"]
    assert turned[["similarity_A", "similarity_B"]].to_numpy() == pytest.approx(1, abs=1e-5)
    assert abs(turned["cosine_A"]) < 0.9, "entries change with the basis"
    angles = scipy.linalg.subspace_angles(B.numpy(), C.numpy())
    assert one_start["similarity_B"] == pytest.approx(np.square(np.cos(angles)).mean(), abs=1e-5)
    assert frame(Factors(), layer(B, A), layer(B @ A)).empty, "a dense update has no factors"
    ranks = frame(Factors(), layer(B, A), layer(C[:, :2], A[:2])).set_index("metric")
    assert [*ranks.index] == ["similarity_A", "similarity_B"] and ranks.loc["similarity_A", "value"] == pytest.approx(1)


def test_factors_of_unrelated_runs_give_their_chance():
    drawn = [frame(Factors(), random_layer(40, 50, 3, seed), random_layer(40, 50, 3, seed + 100)) for seed in range(40)]
    rows = pd.concat(drawn).groupby("metric").agg({"value": ["mean", "std"], "null": "mean", "null_std": "mean"})
    assert (rows["value", "mean"] - rows["null", "mean"]).abs().max() < 0.03
    assert rows["value", "std"].to_numpy() == pytest.approx(rows["null_std", "mean"].to_numpy(), rel=0.35)
