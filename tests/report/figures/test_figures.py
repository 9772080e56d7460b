from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from matplotlib.collections import PolyCollection

from lorabench.config import plugins
from lorabench.config.decode import decode_plugin, encode
from lorabench.report import drawing
from lorabench.report.figures.dynamics import PANELS, Dynamics
from lorabench.report.figures.rank_quality import RankQuality
from lorabench.report.figures.scatter import Scatter
from lorabench.report.figures.spectra import Spectra
from lorabench.report.figures.subspace_grid import SubspaceGrid
from lorabench.report.footnotes import figure_notes
from lorabench.report.results import load_results, selected
from lorabench.spec.figure import SECTIONS, Figure
from lorabench.store.record import Status
from lorabench.store.store import Store
from tests import synthetic
from tests.report.test_results import GRID, load

NAMES = plugins.names("figures")


@pytest.fixture
def results():
    return synthetic.shared()


@pytest.fixture(autouse=True)
def _closed():
    yield
    drawing.plt.close("all")


def drawn(name, results):
    """The figure of the results that have what it shows."""
    figure = plugins.example("figures", name)
    made = (
        results,
        *(make() for make in (synthetic.sequences, synthetic.trajectories, synthetic.logged, synthetic.pictured)),
    )
    return next(canvas for each in made if (canvas := figure.draw(each)))


@pytest.fixture(scope="module")
def laid_out():
    """`laid_out(name)`: a figure that is drawn once, for all tests that only look at it."""

    @cache
    def make(name):
        figure = drawn(name, synthetic.shared())
        figure.draw_without_rendering()
        return figure

    return make


def drawn_ys(item):
    """The y values of a collection's paths."""
    return np.concatenate([path.vertices[:, 1] for path in item.get_paths()] or [[np.nan]])


@pytest.mark.parametrize("name", NAMES)
def test_draws_with_labelled_axes(name, laid_out):
    figure = laid_out(name)
    panels = [axes for axes in figure.axes if axes.get_visible() and axes.get_label() != "<colorbar>"]
    assert any(axes.get_xlabel() for axes in panels) and any(axes.get_ylabel() for axes in panels)
    assert figure.get_figwidth() in (drawing.COLUMN_INCHES, drawing.PAGE_INCHES)


@pytest.mark.parametrize("name", NAMES)
def test_legend_covers_no_panel(name, laid_out):
    figure = laid_out(name)
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1


@pytest.mark.parametrize("name", NAMES)
def test_no_label_or_title_is_cut_off(name, laid_out):
    figure = laid_out(name)
    for axes in (axes for axes in figure.axes if axes.get_visible()):
        for text in filter(lambda text: text.get_text(), (axes.xaxis.label, axes.yaxis.label, axes.title)):
            box = text.get_window_extent()
            assert figure.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1, text.get_text()
            assert figure.bbox.y0 - 1 <= box.y0 and box.y1 <= figure.bbox.y1 + 1, text.get_text()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_draw_is_none(name, tmp_path):
    missing = load_results(Store(tmp_path), synthetic.read())
    assert plugins.example("figures", name).draw(missing) is None


@pytest.mark.parametrize("name", NAMES)
def test_options_come_from_a_sweep_file(name):
    figure = plugins.example("figures", name)
    assert decode_plugin(Figure, encode(figure), "figure") == figure
    assert figure.caption().endswith(".")


def test_the_same_figure_gives_the_same_bytes(tmp_path, results):
    for name in ("one", "two"):
        drawing.save(RankQuality().draw(results), tmp_path / name)
    for kind in (".pdf", ".png"):
        assert (tmp_path / "one").with_suffix(kind).read_bytes() == (tmp_path / "two").with_suffix(kind).read_bytes()


def test_drawing_leaves_the_callers_settings(results):
    before = dict(drawing.plt.rcParams)
    RankQuality().draw(results)
    assert dict(drawing.plt.rcParams) == before


def test_rank_quality_shows_the_means(results):
    (axes,) = RankQuality().draw(results).axes
    done = selected(results).done
    mine = done[(done["quantization"] == "nf4") & (done["method.name"] == "lora")]
    expected = mine.groupby("method.rank")["valid_loss"].mean()
    lines = [container.lines[0].get_ydata() for container in axes.containers]
    assert any(np.allclose(line, expected) for line in lines)


def test_without_a_rank_axis_there_is_no_rank_figure(tmp_path):
    text = GRID.replace("method.rank = [2, 4]", "method.rank = 2")
    assert RankQuality().draw(load(tmp_path, text, lambda spec: spec.lr)) is None


def test_infinite_values_are_left_out(tmp_path):
    results = load(tmp_path, GRID, lambda s: np.inf if s.method.rank == 4 else 1.0 + s.seed, lambda s: Status.DONE)
    (axes, *_) = RankQuality().draw(results).axes
    assert np.isfinite(axes.get_ylim()).all()


def test_spectra_start_at_one_and_fall(results):
    axes = Spectra().draw(results).axes[0]
    for line in axes.lines:
        y = np.asarray(line.get_ydata())
        assert y[0] == pytest.approx(1) and (np.diff(y) < 1e-9).all()


def test_subspace_grid_shows_the_mean_over_layers_and_seeds(results):
    figure = SubspaceGrid(kinds=("v_proj",), pair=(4, 16)).draw(results)
    frame = results.analyses["subspace"]
    ids = results.runs.index[results.runs["quantization"] == "none"]
    frame = frame[(frame["axis"] == "method.rank") & (frame["value_a"] == 4) & (frame["value_b"] == 16)]
    frame = frame[(frame["kind"] == "v_proj") & frame["run_a"].isin(ids)]
    shown = np.asarray(figure.axes[0].collections[0].get_array()).reshape(4, -1)
    assert shown[0, 0] == pytest.approx(frame[(frame["i"] == 1) & (frame["j"] == 1)]["phi"].mean())
    assert shown[3, -1] == pytest.approx(frame[(frame["i"] == 4) & (frame["j"] == 16)]["phi"].mean())
    chance = np.asarray(figure.axes[1].collections[0].get_array()).reshape(4, -1)
    assert chance[3, -1] == pytest.approx(16 / synthetic.DIM)
    assert figure.axes[0].get_ylim()[0] > figure.axes[0].get_ylim()[1]  # i = 1 at the top, as in the paper


def test_subspace_grid_chooses_the_pair_nearest_to_the_papers(results):
    labels = {axes.get_xlabel() for axes in SubspaceGrid().draw(results).axes}
    assert "j (rank 64)" in labels


def test_dynamics_shows_the_mean_over_layers_and_seeds_with_its_null():
    results = synthetic.trajectories()
    figure = Dynamics().draw(results)
    frame = results.analyses["dynamics"].join(results.runs["method.rank"], on="run_id")
    rows = frame[(frame["metric"] == "phi_final_input") & (frame["method.rank"] == 4)]
    panel = next(axes for axes in figure.axes if axes.get_ylabel() == PANELS["phi_final_input"])
    lines = [np.asarray(line.get_xydata()) for line in panel.lines]
    for column in ("value", "null"):
        want = rows.groupby("step")[column].mean()
        assert any(np.allclose(line, np.column_stack([want.index, want])) for line in lines)
    bands = [
        item for item in panel.collections if isinstance(item, PolyCollection) and np.isfinite(drawn_ys(item)).all()
    ]
    assert len(lines) == 6 and len(bands) == 2, "means and nulls; bands where there are three seeds"
    assert frame["run_id"].nunique() == 8


def test_dynamics_of_some_kinds_alone():
    assert Dynamics(kinds=("q_proj",)).draw(synthetic.trajectories()) is not None
    assert Dynamics(kinds=("v_proj",)).draw(synthetic.trajectories()) is None


def test_subspace_grid_between_seeds(results):
    figure = SubspaceGrid(between="seed", rank=4).draw(results)
    assert figure.axes[-2].get_xlabel() == "j (another seed, rank 4)"
    assert np.asarray(figure.axes[0].collections[0].get_array()).size == 16


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_has_a_heading_in_the_report(name):
    assert plugins.example("figures", name).section in SECTIONS


@pytest.mark.parametrize("name", NAMES)
def test_drawn_in_a_subfigure_it_is_the_same(name, results, laid_out):
    whole = laid_out(name)
    part, _ = drawing.plt.figure(figsize=(14, 8), layout="constrained").subfigures(1, 2)
    with drawing.onto(part):
        assert drawn(name, results) is part
    for own, other in zip(part.axes, whole.axes, strict=True):
        assert (own.get_title(), own.get_xlabel()) == (other.get_title(), other.get_xlabel())
        assert [len(own.lines), len(own.collections)] == [len(other.lines), len(other.collections)]
    assert [t.get_text() for legend in part.legends for t in legend.get_texts()] == [
        t.get_text() for legend in whole.legends for t in legend.get_texts()
    ]


def test_scatter_joins_the_values_of_a_key_of_each_setting_in_its_order(tmp_path):
    """Curves of made-up losses: each setting's points are the means of its durations, the shortest first."""
    text = GRID.replace("seed = [0, 1]", "seed = [0, 1]\nsteps = [40, 10, 20, 50, 30]")
    assert text != GRID
    results = load(tmp_path, text, lambda spec: spec.steps / 10 + getattr(spec.method, "rank", 9) + spec.seed)
    results.runs["valid_token_accuracy"] = [1 / steps for steps in results.runs["steps"]]
    figure = Scatter(x="valid_loss", y="valid_token_accuracy", along="steps").draw(results)
    (axes,) = figure.axes
    runs = results.selection.done
    expected = [
        [[chunk["valid_loss"].mean(), 100 / steps] for steps, chunk in group.groupby("steps")]
        for _, group in runs.fillna({"method.rank": -1}).groupby(["method.name", "method.rank"])
    ]
    lines = [np.asarray(line.get_xydata()) for line in axes.lines]
    for curve in expected:
        assert any(line.shape == np.shape(curve) and np.allclose(line, curve) for line in lines), curve
    assert {text.get_text() for text in axes.texts} == {"10", "50", ""}
    several = Scatter(x="valid_loss", y="valid_token_accuracy", along="steps")
    assert "left out" not in figure_notes(results, several)
    assert Scatter(along="seq_len").draw(results) is None
