"""What figures have in common: looks, widths, scales, intervals and what captions add."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from scipy import stats

from lorabench.config import plugins
from lorabench.report import drawing
from lorabench.report.aggregate import bounds, drawn_interval
from lorabench.report.figures import _heat
from lorabench.report.figures.cost_quality import CostQuality
from lorabench.report.figures.heat_map import HeatMap
from lorabench.report.figures.rank_quality import RankQuality
from lorabench.report.figures.spectra import Spectra
from lorabench.report.figures.subspace_grid import SubspaceGrid
from lorabench.report.figures.survival import SurvivalCurves
from lorabench.report.footnotes import figure_notes
from tests import synthetic
from tests.conftest import BASE
from tests.report.test_results import GRID, load

TWO_SEEDS = GRID.replace("lr = [1e-4, 1e-3, 1e-2]", "lr = 1e-3")


@pytest.fixture(autouse=True)
def _closed():
    yield
    drawing.plt.close("all")


def entries(figure):
    """Label -> look of a figure's legend."""
    (legend,) = figure.legends
    handles = zip(legend.get_texts(), legend.legend_handles, strict=True)
    return {text.get_text(): to_hex(handle.get_color()) for text, handle in handles}


def test_a_setting_has_one_colour_in_all_figures_of_a_sweep():
    results = synthetic.shared()
    found = [entries(figure().draw(results)) for figure in (RankQuality, CostQuality, SurvivalCurves, Spectra)]
    assert len({legend["full"] for legend in found}) == 1
    assert found[0]["lora"] == found[1]["lora"] and found[0]["lora, nf4"] == found[1]["lora, nf4"]
    look = drawing.setting_looks(results)
    lora = {"method.name": "lora", "quantization": "none"}
    assert found[2]["lora, rank 64"] == look(lora | {"method.rank": 64}).color
    assert found[0]["lora"] == look(lora).color


def test_settings_that_fail_do_not_change_the_others_look(tmp_path):
    results = synthetic.make(tmp_path, analyzed=False)
    few = dataclasses.replace(results, runs=results.runs.assign(status="failed"))
    assert drawing.setting_looks(results).families == drawing.setting_looks(few).families


def test_looks_differ_in_colour_marker_or_dash():
    found = list(drawing.looks(range(28)).values())
    assert len({(look.color, look.marker) for look in found}) == len({*map(repr, found)}) == 28


@pytest.mark.parametrize("name", plugins.names("figures"))
def test_text_is_seven_points_or_more_at_the_width_asked_for(name):
    example = dataclasses.replace(plugins.example("figures", name), width="column")
    made = (
        synthetic.shared(),
        synthetic.sequences(),
        synthetic.trajectories(),
        synthetic.logged(),
        synthetic.pictured(),
    )
    figure = next(figure for results in made if (figure := example.draw(results)))
    assert figure.get_figwidth() == 3.3
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(drawing.plt.Text) if text.get_text() and text.get_visible()]
    assert texts and min(text.get_fontsize() for text in texts) >= 7
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert figure.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1


@pytest.mark.parametrize("width", ["column", "page"])
def test_a_long_legend_takes_nothing_from_the_panel(width):
    """Nor is it wider than the figure, whose labels have 5, 23 or 80 letters."""
    heights = []
    for count, letters in [(1, 5), (9, 5), (9, 23), (9, 80)]:
        with drawing.facets(["panel"], width, height=2.6) as grid:
            looks = {f"{n} {'low rank ' * 9}"[:letters]: drawing.Look("black", "o") for n in range(count)}
            drawing.legend_below(grid.figure, looks)
            grid.figure.draw_without_rendering()
            box = grid.figure.legends[0].get_window_extent()
            assert grid.figure.bbox.x0 <= box.x0 and box.x1 <= grid.figure.bbox.x1 and len(looks) == count
            heights.append(grid.axes.flat[0].get_position().height * grid.figure.get_figheight())
            drawing.plt.close(grid.figure)
    assert min(heights) > 0.85 * heights[0]


def test_long_titles_keep_apart_and_inside(tmp_path):
    names = ["WWWWWW of a LoRA without any dropout", "LoRA with a dropout of ten percents", "i" * 60, "W" * 35]
    blocks = [f"[[grid]]\nmethod.rank = {rank}\nlabel = '{name}'\n" for rank, name in enumerate(names, 1)]
    results = synthetic.make(tmp_path, f"{BASE}method.name = 'lora'\n{''.join(blocks)}")
    for width in ("page", "column"):
        figure = HeatMap(width=width).draw(results)
        drawing.wrap_titles(figure)
        figure.draw_without_rendering()
        titles = [axes.title for axes in figure.axes if axes.get_title()]
        boxes = [title.get_window_extent() for title in titles]
        assert {"".join(title.get_text().split()) for title in titles} == {"".join(name.split()) for name in names}
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


@pytest.mark.parametrize(("value", "end"), [(0.083, 0.1), (0.41, 0.5), (0.2, 0.2), (0.97, 1), (1e-4, 1e-4), (130, 150)])
def test_a_scale_ends_at_a_round_number_above(value, end):
    assert _heat.rounded_up(value) == pytest.approx(end)
    assert value <= _heat.rounded_up(value) * (1 + 1e-9) <= 2 * value * (1 + 1e-9)


def test_similarities_are_drawn_from_zero_to_the_largest_shown():
    results = synthetic.shared()
    frame = results.analyses["subspace"]
    small = frame.assign(phi=frame["phi"] / 9, chance=frame["chance"] / 90)
    figure = SubspaceGrid().draw(dataclasses.replace(results, analyses=results.analyses | {"subspace": small}))
    *panels, bar = figure.axes
    largest = max(np.nanmax(axes.collections[0].get_array()) for axes in panels)
    norm = panels[0].collections[0].norm
    assert norm.vmin == 0 and largest <= norm.vmax <= 2 * largest
    assert {0.0, norm.vmax} <= {round(tick, 12) for tick in bar.get_yticks()}


def test_similarities_are_written_where_cells_are_few():
    results = synthetic.shared()
    figure = SubspaceGrid(pair=(1, 4)).draw(results)
    axes = figure.axes[0]
    shown = axes.collections[0].get_array()
    assert [text.get_text() for text in axes.texts] == [_heat.short(float(value)) for value in shown.flat]
    assert not SubspaceGrid(pair=(16, 64)).draw(results).axes[0].texts


def test_intervals_are_students_from_three_seeds_on_and_end_at_the_bounds():
    values = [97.0, 99.0, 100.0]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert drawn_interval(values) == pytest.approx((low, high))
    assert high > 100 and drawn_interval(values, bounds("valid_accuracy")) == pytest.approx((low, 100))
    assert all(map(math.isnan, drawn_interval([0.0, 100.0])))
    assert bounds("valid_matthews") == (-1, 1) and bounds("valid_loss") == (-math.inf, math.inf)


def test_two_seeds_are_points_and_no_bars(tmp_path):
    results = load(tmp_path, TWO_SEEDS, lambda spec: 1.0 + spec.seed + spec.method.rank)
    axes = RankQuality().draw(results).axes[0]
    bars = [bar for item in axes.collections if isinstance(item, LineCollection) for bar in item.get_segments()]
    assert not [bar for bar in bars if len(bar) and np.ptp(bar[:, 1]) > 0]
    dots = np.concatenate([item.get_offsets()[:, 1] for item in axes.collections if len(item.get_offsets())])
    assert {3.0, 4.0, 3.5} <= set(dots)


def test_a_single_point_has_axes_that_can_be_read(tmp_path):
    text = TWO_SEEDS.replace("method.rank = [2, 4]", "method.rank = 2")
    figure = RankQuality().draw(load(tmp_path, TWO_SEEDS, lambda spec: 3.0))
    assert figure.axes[0].get_ylim() == pytest.approx((2.85, 3.15))
    panels = CostQuality(costs=("valid_loss",)).draw(load(tmp_path / "one", text, lambda spec: 3.0)).axes
    assert [axes.get_xlim() for axes in panels] == [pytest.approx((2.85, 3.15))]


def test_captions_tell_what_is_true_of_the_sweep(tmp_path):
    results = synthetic.shared()
    notes = figure_notes(results, SurvivalCurves())
    assert "own best learning rate" in notes and "95%" in notes and "one seed or two" in notes
    assert "some of the ranks are left out" in notes
    few = figure_notes(load(tmp_path, TWO_SEEDS, lambda spec: 1.0 + spec.seed), SurvivalCurves())
    assert "best" not in few and "95%" not in few and "left out" not in few and "one seed or two" in few


@pytest.mark.parametrize(
    ("grid", "note"),
    [
        (GRID, "its rank"),
        (GRID.replace("method.rank = [2, 4]", "method.rank = 2"), ""),
        (GRID.replace("method.rank = [2, 4]", f"method.dropout = {[n / 10 for n in range(9)]}"), "in the legend"),
    ],
)
def test_numbers_beside_points_are_told_of_where_there_are_some(tmp_path, grid, note):
    results = load(tmp_path, grid, lambda spec: 2.0 + spec.lr)
    figure = CostQuality(costs=("valid_loss",))
    drawn = figure.draw(results)
    numbers = [text.get_text() for axes in drawn.axes for text in axes.texts if text.get_text().strip()]
    told = [sentence for sentence in figure_notes(results, figure).split(". ") if "number beside a point" in sentence]
    assert bool(numbers) == bool(told) == bool(note) and all(note in sentence for sentence in told)
