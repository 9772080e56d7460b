"""The figures of ΔW draw the numbers of the analyses' frames, averaged here by other means."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from scipy import stats

from lorabench.config.decode import InputError
from lorabench.report import drawing
from lorabench.report.figures import accumulation
from lorabench.report.figures.accumulation import AccumulationCurves
from lorabench.report.figures.amplification import Amplification
from lorabench.report.figures.containment import Containment
from lorabench.report.figures.cosine_map import CosineMap
from lorabench.report.figures.depth_profile import DepthProfile
from lorabench.report.figures.heat_map import HeatMap
from lorabench.report.figures.intruder_curves import IntruderCurves
from lorabench.report.figures.off_principal import OffPrincipalCurves
from lorabench.report.figures.profile import ProfileCurves
from lorabench.report.figures.sparsity import SparsityPoints
from lorabench.report.figures.survival import SurvivalCurves
from lorabench.report.results import selected
from tests import synthetic

FIGURES = (HeatMap, DepthProfile, Amplification, IntruderCurves, SurvivalCurves, Containment)
FIGURES += (CosineMap, OffPrincipalCurves, ProfileCurves, SparsityPoints)
ONE = synthetic.TEXT.replace("method.rank = [1, 4, 16, 64]", "method.rank = 4").replace('["none", "nf4"]', '"none"')
ONE = ONE.replace('[[grid]]\nmethod.name = "full"\nlr = [3e-4, 1e-3]\n', "")
ONE = ONE.replace('columns = "method.rank"\n', "")


@pytest.fixture
def results():
    return synthetic.shared()


@pytest.fixture(scope="module")
def one_setting(tmp_path_factory):
    return synthetic.make(tmp_path_factory.mktemp("store"), ONE)


@pytest.fixture(scope="module")
def intruder_curves():
    """Of the shared results; for tests that only look at it."""
    return IntruderCurves().draw(synthetic.shared())


def _closed():
    yield
    drawing.plt.close("all")


def rows(results, analysis, rank, **where):
    """The rows of unquantized LoRA of this rank (None: full fine-tuning), with the run's seed."""
    runs = selected(results).done
    of_rank = runs["method.rank"].isna() if rank is None else runs["method.rank"] == rank
    runs = runs[of_rank & (runs["quantization"] == "none")]
    frame = results.analyses[analysis]
    frame = frame[frame["run_id"].isin(runs.index)]
    for key, value in where.items():
        frame = frame[frame[key] == value]
    return frame.assign(seed=frame["run_id"].map(runs["seed"]).astype(int))


def replaced(results, analysis, change):
    """The results with another frame of one analysis."""
    return dataclasses.replace(results, analyses=results.analyses | {analysis: change(results.analyses[analysis])})


def line(axes, y):
    """The line of the axes that has these y values."""
    found = [
        item for item in axes.lines if np.shape(item.get_ydata()) == np.shape(y) and np.allclose(item.get_ydata(), y)
    ]
    assert found, [item.get_ydata() for item in axes.lines]
    return found[0]


def cells(axes):
    """The numbers behind the colours of a heat map."""
    return axes.collections[0].get_array()


def segments(axes):
    """Of the bars of intervals."""
    bars = [item for item in axes.collections if isinstance(item, LineCollection)]
    return [segment for item in bars for segment in item.get_segments() if len(segment)]


def panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title() == title)


@pytest.mark.parametrize("figure", FIGURES)
def test_one_setting_is_enough(figure, one_setting):
    drawn = figure(**({"between": "seed"} if figure is Containment else {})).draw(one_setting)
    drawn.draw_without_rendering()
    assert drawn.axes


@pytest.mark.parametrize("figure", FIGURES)
def test_without_its_analysis_there_is_no_figure(figure, results):
    assert figure().draw(dataclasses.replace(results, analyses={})) is None
    empty = {name: frame.iloc[:0] for name, frame in results.analyses.items()}
    assert figure().draw(dataclasses.replace(results, analyses=empty)) is None


@pytest.mark.parametrize("figure", FIGURES)
def test_kinds_that_are_asked_for_alone_count(figure, results):
    if "kinds" not in {field.name for field in dataclasses.fields(figure)}:
        pytest.skip("sums over all matrices")
    alone = {
        name: frame[frame["kind"] == "v_proj"] if "kind" in frame else frame for name, frame in results.analyses.items()
    }
    asked = figure(kinds=("v_proj",)).draw(results)
    given = figure().draw(dataclasses.replace(results, analyses=alone))
    for a, b in zip(asked.axes, given.axes, strict=True):
        for one, two in zip(a.lines, b.lines, strict=True):
            assert np.array_equal(np.asarray(one.get_xydata(), float), np.asarray(two.get_xydata(), float))


def test_heat_map_shows_the_mean_over_seeds(results):
    figure = HeatMap(value=("spectrum.relative_norm",)).draw(results)
    frame = rows(results, "spectrum", 64, metric="relative_norm")
    shown = cells(panel(figure, "lora, rank 64"))
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["q_proj", "k_proj", "v_proj", "o_proj"]
    for i, kind in enumerate(labels):
        for depth in range(2):
            expected = np.mean(frame[(frame["kind"] == kind) & (frame["depth"] == depth)]["value"])
            assert shown[i, depth] == pytest.approx(expected)


def test_heat_map_writes_its_numbers_where_they_fit(results):
    figure = HeatMap(value="spectrum.effective_rank_entropy").draw(results)
    axes = panel(figure, "full")
    value = float(cells(axes)[0, 0])
    assert axes.texts[0].get_text() == f"{value:.0f}"

    def deep(frame):
        return pd.concat([frame.assign(depth=frame["depth"] + 2 * i) for i in range(24)])

    figure = HeatMap(value="spectrum.effective_rank_entropy").draw(replaced(results, "spectrum", deep))
    assert not any(axes.texts for axes in figure.axes)


def test_heat_map_leaves_what_was_not_trained_to_the_hatching(results):
    full = rows(results, "spectrum", None)["run_id"].unique()

    def without(frame):
        return frame[~(frame["run_id"].isin(full) & (frame["kind"] == "v_proj"))]

    figure = HeatMap(value="spectrum.relative_norm").draw(replaced(results, "spectrum", without))
    shown = cells(panel(figure, "full"))
    assert shown.mask[2].all() and not shown.mask[[0, 1, 3]].any()
    assert all(patch.get_hatch() for patch in panel(figure, "full").patches)


def test_heat_map_chooses_colours_by_sign_and_span(results):
    def colors(change):
        found = replaced(results, "spectrum", lambda frame: frame.assign(value=change(frame["value"].astype(float))))
        image = HeatMap(value="spectrum.relative_norm").draw(found).axes[0].collections[0]
        return image.norm, image.cmap.name

    norm, name = colors(lambda values: values - 0.18)
    assert name == "RdBu_r" and norm.vmin == -norm.vmax
    norm, name = colors(lambda values: values**40)
    assert name == "viridis" and type(norm).__name__ == "LogNorm"
    norm, name = colors(lambda values: values)
    assert name == "viridis" and type(norm).__name__ == "Normalize"


def test_depth_profile_draws_means_and_nulls(results):
    figure = DepthProfile(value="spectrum.rank_90").draw(results)
    frame = rows(results, "spectrum", 64, metric="rank_90", kind="q_proj")
    means = frame.groupby("depth")[["value", "null"]].mean()
    axes = panel(figure, "lora, rank 64")
    assert line(axes, means["value"]).get_linestyle() == "-"
    assert line(axes, means["null"]).get_linestyle() == "--"
    assert np.allclose(np.diff(line(axes, means["value"]).get_xdata()), 1)  # blocks, shifted as a whole


def test_depth_profile_bars_are_students_interval(results):
    figure = DepthProfile(value="spectrum.relative_norm", lines="setting").draw(results)
    values = rows(results, "spectrum", 64, metric="relative_norm", kind="q_proj", depth=0)["value"].astype(float)
    low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    assert any(np.allclose(bar[:, 1], [low, high]) for bar in segments(panel(figure, "q_proj")))


def test_intruders_are_summed_over_matrices(results, intruder_curves):
    figure = intruder_curves
    frame = rows(results, "intruders", 4, metric="count")
    sums = frame.groupby(["run_id", "epsilon", "k"], observed=True)[["value", "null"]].sum()
    means = sums.groupby(["epsilon", "k"]).mean()
    over_epsilon, over_k = means.xs(10, level="k"), means.xs(0.5, level="epsilon")
    assert list(line(figure.axes[0], over_epsilon["value"]).get_xdata()) == list(over_epsilon.index)
    assert line(figure.axes[0], over_epsilon["null"]).get_linestyle() == "--"
    assert list(line(figure.axes[1], over_k["value"]).get_xdata()) == list(over_k.index)
    assert figure.axes[0].get_ylabel() == "Intruders in 8 matrices"


def test_intruders_say_how_many_are_degenerate(results, intruder_curves):
    (legend,) = intruder_curves.legends
    frame = rows(results, "intruders", 4, metric="num_intruders")
    share = 100 * frame["num_degenerate"].sum() / frame["value"].sum()
    assert f"lora, rank 4 ({share:.0f}% degenerate)" in [text.get_text() for text in legend.get_texts()]


def over_settings(results, counts):
    """ρ of intruders and forgetting, of the means of each rank, quantization and learning rate; and of how many."""
    runs = results.runs.loc[counts.index]
    keys = [runs[key].map(repr) for key in ("method.name", "method.rank", "quantization", "lr")]
    means = pd.DataFrame({"counts": counts, "forgetting": runs["forgetting"]}).groupby(keys).mean()
    found = stats.spearmanr(means["counts"], means["forgetting"])
    return f"ρ = {found.statistic:.2f} (p = {found.pvalue:.2g})".replace("-", "−"), len(means)


def test_unstable_runs_are_crossed_and_the_correlation_without_them_stands_beside(results):
    frame = results.analyses["intruders"]
    counts = frame[frame["metric"] == "num_intruders"].groupby("run_id", observed=True)["value"].sum()
    bad = results.runs["method.rank"].eq(64) & results.runs.index.isin(counts.index)
    marked = dataclasses.replace(results, runs=results.runs.assign(unstable=bad.astype(float)))
    axes = IntruderCurves().draw(marked).axes[2]
    titles = axes.get_title().split("\nstable ")
    expected = [over_settings(results, each) for each in (counts, counts[~bad[counts.index]])]
    assert titles == [title for title, _ in expected] and titles[0] != titles[1]
    (whole, stable), note = (number for _, number in expected), IntruderCurves().notes(marked)
    assert note == [f"ρ: over {whole} settings, {stable} without unstable runs."]
    crosses = axes.collections[-1].get_offsets()
    pairs = zip(counts[bad[counts.index]], results.runs.loc[bad, "forgetting"], strict=True)
    assert sorted(map(tuple, crosses)) == sorted(pairs) and len(crosses) == bad.sum()


def test_forgetting_against_intruders_with_their_rank_correlation(results, intruder_curves):
    figure = intruder_curves
    frame = results.analyses["intruders"]
    counts = frame[frame["metric"] == "num_intruders"].groupby("run_id", observed=True)["value"].sum()
    forgetting = results.runs.loc[counts.index, "forgetting"]
    whole, num_settings = over_settings(results, counts)
    assert figure.axes[2].get_title() == whole and num_settings < len(counts)
    assert IntruderCurves().notes(results) == [f"ρ: over {num_settings} settings."]
    points = np.concatenate([item.get_offsets() for item in figure.axes[2].collections])
    assert sorted(map(tuple, points)) == sorted(zip(counts, forgetting, strict=True))


def test_no_rank_correlation_of_few_runs_and_no_panel_without_the_measure(results, one_setting):
    assert IntruderCurves().draw(one_setting).axes[2].get_title() == ""
    forgotten = dataclasses.replace(results, runs=results.runs.drop(columns="forgetting"))
    assert len(IntruderCurves().draw(forgotten).axes) == 2


def test_amplification_is_a_geometric_mean(results):
    figure = Amplification().draw(results)
    frame = rows(results, "alignment", 64, metric="amplification_at")
    means = np.exp(np.log(frame[["value", "null"]].astype(float)).groupby(frame["r"]).mean())
    assert list(line(figure.axes[0], means["value"]).get_xdata()) == list(means.index)
    assert line(figure.axes[0], means["null"]).get_linestyle() == "--"
    whole = rows(results, "alignment", 64, metric="amplification", kind="k_proj")
    assert line(figure.axes[1], [stats.gmean(whole["value"].astype(float))])


def test_amplification_stops_where_a_layer_has_no_more_directions(results):
    def small(frame):
        return frame[~((frame["layer"] == frame["layer"].iloc[0]) & (frame["r"] > 2))]

    axes = Amplification().draw(replaced(results, "alignment", small)).axes[0]
    assert max(item.get_xdata()[-1] for item in axes.lines) == 2


def test_survival_draws_both_sides_beside_chance(results):
    figure = SurvivalCurves().draw(results)
    for axes, side in zip(figure.axes, ("input", "output"), strict=True):
        frame = rows(results, "survival", 64, metric="survival_at", side=side)
        line(axes, frame.groupby("k")["value"].mean())
        assert line(axes, np.arange(1, 33) / synthetic.DIM).get_linestyle() == "--"


def test_off_principal_draws_each_measure_beside_a_random_update(results):
    figure = OffPrincipalCurves().draw(results)
    for axes, metric in zip(figure.axes, ("spectral_shift_at", "angle_mean", "rotation_gap_at"), strict=True):
        of_runs = rows(results, "off_principal", None, metric=metric).groupby(["k", "seed"])[["value", "null"]].mean()
        means = np.exp(np.log(of_runs).groupby("k").mean())
        line(axes, means["value"])
        assert line(axes, means["null"]).get_linestyle() == "--"


def test_the_profile_is_drawn_over_what_a_random_update_does(results):
    figure = ProfileCurves().draw(results)
    for axes, side in zip(figure.axes, ("input", "output", "both"), strict=True):
        frame = rows(results, "profile", None, side=side)
        ratio = frame["value"] ** 2 / (frame["null"] ** 2 + frame["null_std"] ** 2)
        of_runs = ratio.groupby([frame["first"], frame["seed"]]).mean() ** 0.5
        line(axes, np.exp(np.log(of_runs).groupby("first").mean()))


def test_sparsity_shows_the_shares_in_percent(results):
    changed, among = SparsityPoints().draw(results).axes
    names = [text.get_text() for text in changed.get_yticklabels()]
    for axes, metric in ((changed, "changed"), (among, "changed_in_principal")):
        wanted = 100 * rows(results, "sparsity", None, metric=metric)["value"].mean()
        points = np.concatenate([item.get_offsets() for item in axes.collections if len(item.get_offsets())])
        assert np.abs(points - (wanted, names.index("full"))).sum(1).min() < 1e-6


def test_the_map_is_of_one_run_a_panel_and_of_the_layer_that_is_asked_for(results):
    figure = CosineMap().draw(results)
    first = rows(results, "cosines", None).query("seed == 0").pivot(index="i", columns="j", values="cosine")
    shown = np.asarray(cells(panel(figure, "full"))).reshape(17, 16)
    assert np.allclose(shown, np.concatenate([first.to_numpy()[1:], first.to_numpy()[:1]]))
    assert CosineMap(layer="no.such").draw(results) is None


def test_containment_draws_both_ways_beside_chance(results):
    figure = Containment(sides="output").draw(results)
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels[:2] == ["full in lora, rank 1", "lora, rank 1 in full"]
    frame = results.analyses["overlap"]
    frame = frame[(frame["axis"] == "method") & (frame["side"] == "output")]
    runs = results.runs.loc[frame["run_b"], "method.rank"].to_numpy()
    expected = {
        "full in lora, rank 4": frame[(runs == 4) & (frame["metric"] == "energy_a_in_b")],
        "lora, rank 4 in full": frame[(runs == 4) & (frame["metric"] == "energy_b_in_a")],
    }
    for name, chunk in expected.items():
        points = [item.get_xdata()[0] for item in axes.lines if round(float(item.get_ydata()[0])) == labels.index(name)]
        assert chunk["value"].mean() == pytest.approx(points[0]) and chunk["null"].iloc[0] == pytest.approx(points[1])


def test_containment_between_seeds_has_one_line_a_setting(results):
    (axes,) = Containment(between="seed").draw(results).axes
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert "lora, rank 4 in another seed" in labels and len(labels) == len(set(labels))
    assert all(np.ptp(bar[:, 0]) == 0 for bar in segments(axes))  # pairs of seeds share runs


@pytest.mark.parametrize("value", ["spectrum.rank_9", "alignment.amplification_at", "valid"])
@pytest.mark.parametrize("name", ["heat_map", "depth_profile"])
def test_an_unknown_metric_is_refused_when_the_sweep_is_read(name, value):
    with pytest.raises(InputError, match=rf"figure 1: figure.*{value}.*unknown measure"):
        synthetic.read(synthetic.TEXT + f'[[figure]]\nname = "{name}"\nvalue = "{value}"\n')
    synthetic.read(synthetic.TEXT + f'[[figure]]\nname = "{name}"\nvalue = "alignment.amplification"\n')


def test_intruders_over_snapshots_are_sums_over_matrices_and_means_over_seeds():
    results = synthetic.trajectories()
    frame = results.analyses["accumulation"]
    canvas = AccumulationCurves().draw(results)
    for metric, axes in zip(("num_intruders", "num_new"), canvas.axes, strict=False):
        rows = frame[frame["metric"] == metric]
        sums = rows.groupby(["run_id", "step"], observed=True)["value"].sum().unstack("step")
        runs = results.runs.loc[sums.index]
        means = sums.groupby(runs["method.rank"].fillna(0)).mean()
        drawn = [line.get_ydata() for line in axes.lines if len(line.get_ydata()) == 4]
        for _, mean in means.iterrows():
            assert any(np.allclose(mean, line) for line in drawn), metric
    assert canvas.axes[0].get_ylabel() == "Intruders in\n2 matrices"
    drawing.plt.close(canvas)


def test_a_sequence_has_the_names_of_its_tasks_where_they_end():
    def runs(*tasks, steps=(5, 5)):
        return pd.DataFrame({"tasks": tasks, "steps": steps[: len(tasks)]})

    assert accumulation._tasks(runs("code > sums", "code > sums")) == {5: "code", 10: "sums"}
    assert accumulation._tasks(runs("code > sums", "sums > code")) == {5: "task 1", 10: "task 2"}
    assert accumulation._tasks(runs("code > sums", None)) == {}
    assert accumulation._tasks(runs("code > sums", "code > sums", steps=(5, 6))) == {}
