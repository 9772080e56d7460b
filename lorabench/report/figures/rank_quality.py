"""Rank against quality, a line for each method; methods without a rank and the untouched base as levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.spec.figure import Figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

RANK = "method.rank"
IN_PANEL = ("method.name", "quantization")


@dataclass(frozen=True, kw_only=True)
class RankQuality(Figure):
    """Lines are methods (and quantizations), panels are every other swept key."""

    section: ClassVar[str] = "cost"

    value: str | None = None
    """The measure (None: validation loss or accuracy, whichever the sweep selects by)."""

    @property
    def measures(self) -> list[str]:
        return [self.value] if self.value else []

    def draw(self, results: Any) -> MatplotlibFigure | None:
        from lorabench.report import drawing
        from lorabench.report.aggregate import bounds
        from lorabench.report.figures._curves import SERIES, draw_lines
        from lorabench.report.labels import capitalized, series_label, with_unit
        from lorabench.report.results import grouped
        from lorabench.report.tables import quality

        value = self.value or f"valid_{quality(results)}"
        runs = _labelled(results, value)
        ranked = runs[runs[RANK].notna()] if RANK in results.settings else runs.iloc[:0]
        if ranked.empty:
            return None
        panel_keys = [key for key in results.settings if key not in (RANK, *IN_PANEL)]
        places = {series_label(panel_keys, place, full=True): place for place, _ in grouped(ranked, panel_keys)}
        family = drawing.setting_looks(results)
        keys = [key for key in results.settings if key != RANK]
        looks = {
            rows[SERIES].iloc[0]: family(dict(zip(keys, values, strict=True))) for values, rows in grouped(runs, keys)
        }
        handles: dict[str, Any] = {}
        with drawing.style():
            grid = drawing.facets(places, self.width, height=2.6)
            same = {title: _in_panel(runs, panel_keys, places[title]) for title in grid.axes_dict}
            for title, axes in grid.axes_dict.items():
                of_panel = same[title]
                lines = of_panel[of_panel[RANK].notna()]
                mine = {name: look for name, look in looks.items() if name in set(lines[SERIES])}
                draw_lines(axes, _apart(lines, mine), mine, "x", bars=0, within=bounds(value))
                handles |= {name: look.handle for name, look in mine.items()}
                handles |= _levels(axes, of_panel[of_panel[RANK].isna()], value, looks)
                drawing.powers_of_two(axes, ranked[RANK])
            drawing.limit(list(grid.axes.flat), logs=False)
            for title, axes in grid.axes_dict.items():
                handles |= _base(axes, same[title], value)
            grid.set_axis_labels("Rank", capitalized(with_unit(value)))
            drawing.legend_below(grid.figure, handles)
        return grid.figure

    def caption(self) -> str:
        return (
            "Quality against rank: means over seeds. Methods without a rank are horizontal lines; base: before "
            "training (an arrow: above or below the panel)."
        )


EXAMPLE = RankQuality()


def _labelled(results: Any, value: str) -> pd.DataFrame:
    """The selected runs that can be drawn, with the measure as `value` in the unit that is shown, and their series."""
    from lorabench.report import drawing
    from lorabench.report.figures._curves import SERIES, VALUE
    from lorabench.report.labels import measure, series_label
    from lorabench.report.results import selected

    runs = drawing.finite(selected(results).done, value)
    keys = [key for key in results.settings if key != RANK]
    labels = [series_label(keys, [run[key] for key in keys]) for _, run in runs.iterrows()]
    factor = 100.0 if measure(value).unit == "%" else 1.0
    return runs.assign(**{SERIES: labels, VALUE: factor * runs[value] if value in runs else ()})


def _in_panel(runs: pd.DataFrame, keys: list[str], values: tuple[Any, ...]) -> pd.DataFrame:
    """The runs of a panel, with those that have no such key (full fine-tuning has no targets)."""
    from lorabench.report.results import kept_rows

    for key, value in zip(keys, values, strict=True):
        runs = kept_rows(runs, (item is None or item == value for item in runs[key]))
    return runs


def _apart(lines: pd.DataFrame, looks: dict[str, Any]) -> pd.DataFrame:
    """With the rank as `x`, each series shifted a little, so that no bar hides another's."""
    from lorabench.report.figures._curves import SERIES

    middle = (len(looks) - 1) / 2
    shifts = {name: 1.05 ** (position - middle) for position, name in enumerate(looks)}
    return lines.assign(x=lines[RANK].astype(float) * lines[SERIES].map(shifts))


def _levels(axes: Axes, runs: pd.DataFrame, value: str, looks: dict[str, Any]) -> dict[str, Any]:
    """Methods without a rank as horizontal lines; label -> handle."""
    from lorabench.report.aggregate import bounds
    from lorabench.report.figures._curves import SERIES, measured

    handles = {}
    for name, chunk in runs.groupby(SERIES, sort=False):
        item, look = measured(chunk, value, bounds(value)), looks[name]
        if item["y_low"] < item["y_high"]:
            axes.axhspan(item["y_low"], item["y_high"], color=look.color, alpha=0.15, linewidth=0)
        handles[str(name)] = axes.axhline(item["y"], color=look.color, linestyle=look.dashes, zorder=2)
    return handles


def _base(axes: Axes, runs: pd.DataFrame, value: str) -> dict[str, Any]:
    """The base before training as a grey line; where it would squash the data, only its number in the legend."""
    from matplotlib.lines import Line2D

    from lorabench.report import drawing
    from lorabench.report.aggregate import plain
    from lorabench.report.labels import measure

    column = f"base_{value}"
    if column not in runs or runs[column].isna().all():
        return {}
    factor = 100.0 if measure(value).unit == "%" else 1.0
    low, high = axes.get_ylim()
    handles: dict[str, Any] = {}
    levels = (runs.groupby("quantization", sort=False)[column].mean() * factor).to_dict()
    for (quantization, level), dash in zip(levels.items(), (3, 1, 5), strict=False):
        name = "base" if quantization == "none" else f"base, {quantization}"
        if low - 0.6 * (high - low) <= level <= high + 0.6 * (high - low):
            handles[name] = axes.axhline(level, color=drawing.REFERENCE, linestyle=(0, (dash, 1.5)), zorder=1)
            room = 0.04 * (high - low)
            axes.set_ylim(min(axes.get_ylim()[0], level - room), max(axes.get_ylim()[1], level + room))
        else:
            handles[f"{name}: {plain(level)} {'↑' if level > high else '↓'}"] = Line2D([], [], linestyle="none")
    return handles
