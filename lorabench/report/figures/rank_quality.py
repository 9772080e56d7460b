"""Rank against quality, a line for each method; methods without a rank and the untouched base as levels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lorabench.report.labels import series_label, shown_factor
from lorabench.report.update_metrics import RANK, VALUE, axis_label
from lorabench.spec.figure import Axes, Canvas, Figure, Frame


@dataclass(frozen=True, kw_only=True)
class RankQuality(Figure):
    """Lines are methods (and quantizations), panels are every other swept key."""

    section: ClassVar[str] = "cost"
    needs: ClassVar[str] = "runs of methods with a rank that are done, and of which one sweeps it"

    value: str | None = None
    """The measure (None: validation loss or accuracy, whichever the sweep selects by)."""

    def draw(self, results: Any) -> Canvas | None:
        from lorabench.report import drawing
        from lorabench.report.figures._curves import IN_PANEL, SERIES, alike
        from lorabench.report.results import grouped

        value = self.value or f"valid_{results.quality}"
        runs = drawing.finite(results.selection.done, value)
        ranked = runs[runs[RANK].notna()] if RANK in results.settings else runs.iloc[:0]
        if ranked.empty:
            return None
        keys = [key for key in results.settings if key != RANK]
        labels = [series_label(keys, values) for values in runs[keys].itertuples(index=False, name=None)]
        runs = runs.assign(**{SERIES: labels, VALUE: shown_factor(value) * runs[value]})
        family = drawing.setting_looks(results)
        looks = {rows[SERIES].iloc[0]: family(rows.iloc[0][keys]) for _, rows in grouped(runs, keys)}
        keys = [key for key in keys if key not in IN_PANEL]
        places = {series_label(keys, place, full=True): dict(zip(keys, place, strict=True))
                  for place, _ in grouped(ranked, keys)}  # fmt: skip
        entries: dict[str, Any] = {}
        with drawing.facets(places, self.width, height=2.6) as grid:
            for title, axes in grid.axes_dict.items():
                entries |= _draw_panel(axes, alike(runs, places[title]), value, looks)
                drawing.powers_of_two(axes, ranked[RANK])
            drawing.limit(list(grid.axes.flat), logs=False)
            for title, axes in grid.axes_dict.items():
                entries |= _draw_base(axes, alike(runs, places[title]), value)
            grid.set_axis_labels("Rank", axis_label(value))
            drawing.legend_below(grid.figure, entries)
        return grid.figure

    def caption(self) -> str:
        return (
            "Quality against rank: means over seeds. Methods without a rank are horizontal lines; base: before "
            "training (an arrow: above or below the panel)."
        )


EXAMPLE = RankQuality()


def _draw_panel(axes: Axes, runs: Frame, value: str, looks: dict[str, Any]) -> dict[str, Any]:
    """A line a series, shifted a little, so that no bar hides another's; what has no rank is level. The legend."""
    from lorabench.report.aggregate import bounds
    from lorabench.report.figures._curves import SERIES, draw_lines, measured

    lines, levels = runs[runs[RANK].notna()], runs[runs[RANK].isna()]
    mine = {name: look for name, look in looks.items() if name in set(lines[SERIES])}
    shifts = {name: 1.05 ** (place - (len(mine) - 1) / 2) for place, name in enumerate(mine)}
    lines = lines.assign(x=lines[RANK].astype(float) * lines[SERIES].map(shifts))
    draw_lines(axes, lines, mine, "x", apart=0, within=bounds(value))
    for name, chunk in levels.groupby(SERIES, sort=False):
        item, look = measured(chunk, value), replace(looks[name], marker="")
        axes.axhspan(item["y_low"], item["y_high"], color=look.color, alpha=0.15, linewidth=0)
        axes.axhline(item["y"], color=look.color, linestyle=look.dashes, zorder=2)
        mine[name] = look
    return mine


def _draw_base(axes: Axes, runs: Frame, value: str) -> dict[str, Any]:
    """The base before training as a grey line; where it would squash the data, only its number in the legend."""
    from matplotlib.lines import Line2D

    from lorabench.report.aggregate import plain
    from lorabench.report.drawing import REFERENCE

    column, entries = f"base_{value}", {}
    if column not in runs or runs[column].isna().all():
        return {}
    low, high = axes.get_ylim()
    levels = shown_factor(value) * runs.groupby("quantization", sort=False)[column].mean()
    for (quantization, level), dash in zip(levels.items(), (3, 1, 5), strict=False):
        name = "base" if quantization == "none" else f"base, {quantization}"
        if low - 0.6 * (high - low) <= level <= high + 0.6 * (high - low):
            entries[name] = axes.axhline(level, color=REFERENCE, linestyle=(0, (dash, 1.5)), zorder=1)
            (bottom, top), room = axes.get_ylim(), 0.04 * (high - low)
            axes.set_ylim(min(bottom, level - room), max(top, level + room))
        else:
            entries[f"{name}: {plain(level)} {'↑' if level > high else '↓'}"] = Line2D([], [], linestyle="none")
    return entries
