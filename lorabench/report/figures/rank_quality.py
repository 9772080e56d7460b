"""Rank against quality, a line for each method; methods without a rank and the untouched base as levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.spec.figure import Figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

    from lorabench.report.aggregate import Cell

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
        from lorabench.report.labels import capitalized, series_label, with_unit
        from lorabench.report.results import grouped, selected
        from lorabench.report.tables import quality

        value = self.value or f"valid_{quality(results)}"
        runs = drawing.finite(selected(results).done, value)
        ranked = runs[runs[RANK].notna()] if RANK in results.settings else runs.iloc[:0]
        if ranked.empty:
            return None
        panel_keys = [key for key in results.settings if key not in (RANK, *IN_PANEL)]
        panels = grouped(ranked, panel_keys)
        columns = drawing.panel_columns(len(panels))
        with drawing.style():
            figure, grid = drawing.new_figure(-(-len(panels) // columns), columns, sharey=True, height=2.6)
            looks = drawing.looks(values for values, _ in grouped(runs, IN_PANEL))
            handles: dict[str, Any] = {}
            drawn: list[Cell] = []
            for axes, (values, chunk) in zip(grid.flat, panels, strict=False):
                same = _in_panel(runs, panel_keys, values)
                panel, items = _panel(axes, chunk, same[same[RANK].isna()], value, looks)
                handles |= panel
                drawn += items
                axes.set_title(series_label(panel_keys, values, full=True))
            drawing.limit_y(grid[0, 0], drawn)
            for axes, (values, _) in zip(grid.flat, panels, strict=False):
                handles |= _base(axes, _in_panel(runs, panel_keys, values), value)
            for axes in drawing.lowest(grid, len(panels)):
                axes.set_xlabel("Rank")
            for axes in grid[:, 0]:
                axes.set_ylabel(capitalized(with_unit(value)))
            drawing.legend_below(figure, list(handles.values()), list(handles))
        return figure

    def caption(self) -> str:
        return (
            "Quality against rank. Points are means over seeds at each setting's own best learning rate, bars and "
            "bands 95% Student-t intervals; a hollow point has a single seed and no interval. Methods without a rank "
            "are horizontal lines; base: before training (an arrow: above or below the panel)."
        )


EXAMPLE = RankQuality()


def _in_panel(runs: pd.DataFrame, keys: list[str], values: tuple[Any, ...]) -> pd.DataFrame:
    """The runs of a panel, with those that have no such key (full fine-tuning has no targets)."""
    from lorabench.report.results import kept_rows

    for key, value in zip(keys, values, strict=True):
        runs = kept_rows(runs, (item is None or item == value for item in runs[key]))
    return runs


def _panel(
    axes: Axes, ranked: pd.DataFrame, level: pd.DataFrame, value: str, looks: dict[Any, Any]
) -> tuple[dict[str, Any], list[Cell]]:
    """Draw one panel's lines and levels; label -> handle, and what was drawn."""
    from lorabench.report import drawing
    from lorabench.report.aggregate import cell
    from lorabench.report.labels import series_label
    from lorabench.report.results import grouped, ordered

    handles: dict[str, Any] = {}
    drawn = []
    groups = grouped(ranked, IN_PANEL)
    for position, (values, chunk) in enumerate(groups):
        line = [(rank, cell(chunk[chunk[RANK] == rank], value)) for rank in ordered(chunk[RANK])]
        apart = 1.05 ** (position - (len(groups) - 1) / 2)  # so that no bar hides another's
        handles[series_label(IN_PANEL, values)] = _line(axes, line, apart, looks[values])
        drawn += [item for _, item in line]
    for values, chunk in grouped(level, IN_PANEL):
        item, look = cell(chunk, value), looks[values]
        if item.half is not None:
            axes.axhspan(item.ends[0], item.ends[1], color=look.color, alpha=0.15, linewidth=0)
        handles[series_label(IN_PANEL, values)] = axes.axhline(item.center, color=look.color, zorder=2)
        drawn.append(item)
    drawing.powers_of_two(axes, ranked[RANK])
    return handles, drawn


def _line(axes: Axes, line: list[tuple[int, Cell]], apart: float, look: Any) -> Any:
    """One method over the ranks; hollow where there is no interval. `apart` shifts the points sideways."""
    xs, items = zip(*((rank * apart, item) for rank, item in line), strict=True)
    handle = axes.errorbar(
        xs, [item.center for item in items], yerr=[item.half or 0.0 for item in items], color=look.color,
        linestyle=look.dashes, marker=look.marker, capsize=2, elinewidth=0.9, zorder=3,
    )  # fmt: skip
    alone = [(x, item.center) for x, item in zip(xs, items, strict=True) if item.half is None]
    if alone:
        axes.plot(
            *zip(*alone, strict=True), look.marker, color=look.color, markerfacecolor="white", zorder=4
        )  # fmt: skip
    return handle


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
