"""Tables as colours, with a number in each cell where there is room. Imports seaborn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize

from lorabench.report.aggregate import number
from lorabench.report.drawing import LOG_FACTOR, POINTS, facets, inches, plain_logarithmic
from lorabench.report.hover import name_cells
from lorabench.report.labels import value_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAP = "viridis"
ROUND = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
BAR_INCHES = 1.4
"""Of a figure's width, what its colour bar and the labels at its left take."""


def draw_similarities(
    tables: Mapping[str, pd.DataFrame], columns: int, labels: tuple[str, str], bar: str, width: str | None = None
) -> Figure:
    """φ(i, j), a panel a table, on one scale from 0 to the largest shown; `labels` are those of i and j."""
    marks = [sorted({mark for table in tables.values() for mark in table.axes[axis]}) for axis in (0, 1)]
    whole = [table.reindex(index=marks[0], columns=marks[1]) for table in tables.values()]
    largest = max((np.nanmax(table) for table in whole if table.notna().any(axis=None)), default=1.0)
    colors = ScalarMappable(Normalize(0, min(1.0, rounded_up(largest))), MAP)
    with facets(tables, width, height=1.75, columns=columns, theme="white") as grid:
        draw_tables(grid.axes.flat, whole, colors, bar, aspect=18 * -(-len(tables) // columns))
        grid.set_axis_labels(labels[1], labels[0])
    return grid.figure


def draw_tables(
    panels: Iterable[Axes], tables: Sequence[pd.DataFrame], colors: ScalarMappable, label: str,
    texts: Sequence[pd.DataFrame] | None = None, **bar: Any,
) -> None:  # fmt: skip
    """A table a panel, with the scale beside them: a cell a number, in it its text, or the number where it fits.

    What is missing stays empty, over hatching. A scale from 0 is marked at both its ends.
    """
    panels = list(panels)
    for axes, table, text in zip(panels, tables, texts or _fitting(tables, panels[0].get_gridspec()), strict=True):
        axes.patch.set(hatch="/////", edgecolor="#C4C4C4")
        with _undrawn():
            sns.heatmap(
                table.astype(float), ax=axes, cmap=colors.cmap, norm=colors.norm, cbar=False, rasterized=True, zorder=2,
                annot=None if text is None else text.to_numpy(), fmt="", annot_kws={"size": POINTS, "zorder": 3},
                xticklabels=False, yticklabels=False,
            )  # fmt: skip
        name_cells(axes, table)
        for axis, names in ((axes.xaxis, table.columns), (axes.yaxis, table.index)):
            places = _marked(list(names))
            axis.set_ticks([place + 0.5 for place in places], [str(names[place]) for place in places])
            axis.label.set_text("")
        axes.tick_params(length=0, labelrotation=0)
    scale = panels[0].figure.colorbar(colors, ax=panels, label=label, **{"pad": 0.01, "aspect": 16, **bar})
    scale.outline.set_visible(False)
    if isinstance(colors.norm, LogNorm):
        plain_logarithmic(scale.ax.yaxis)
    elif colors.norm.vmin == 0:
        marks = np.linspace(0, colors.get_clim()[1] or 1.0, 5)
        scale.set_ticks(marks.tolist(), labels=[f"{mark:.3g}" for mark in marks])


def _undrawn() -> Any:
    """seaborn draws the whole figure after each of its panels, to see whether labels overlap: here it sets none."""
    return mock.patch.object(sns.matrix, "_draw_figure", lambda figure: None, create=True)


def _marked(names: Sequence[Any], most: int = 6) -> list[int]:
    """Places of the names that stand at an axis: all words, of many numbers the multiples of one."""
    if len(names) <= most or not all(isinstance(name, int | np.integer) for name in names):
        return list(range(len(names)))
    found = ([place for place, name in enumerate(names) if name % step == 0] for step in itertools.count(2))
    return next(places for places in found if len(places) <= most)


def _fitting(tables: Sequence[pd.DataFrame], grid: Any) -> list[Any]:
    """The numbers of the tables' cells, where the widest fits into a cell of the grid's panels; else None for each."""
    texts = [table.map(lambda value: "" if value != value else short(float(value))) for table in tables]
    widest = max((len(text) for table in texts for text in table.to_numpy().flat), default=0)
    rows, columns = (max(len(table.axes[axis]) for table in tables) for axis in (0, 1))
    if grid is None:  # axes that stand in no grid
        return [None] * len(texts)
    width, height = inches(grid.figure)  # less labels, titles and the bar, about
    across, down = (width - BAR_INCHES) / grid.ncols - 0.1, height / grid.nrows - 0.4
    has_room = widest * 0.62 * POINTS + 3 <= 72 * across / columns and 72 * down / rows >= POINTS + 3
    return texts if has_room else [None] * len(texts)


def rounded_up(value: float) -> float:
    """`0.083` -> 0.1, `0.41` -> 0.5: what a scale ends at."""
    if not value > 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return float(f"{next(step for step in ROUND if step * unit >= value * (1 - 1e-9)) * unit:.2g}")


def spanning(tables: Sequence[pd.DataFrame]) -> ScalarMappable:
    """Diverging around 0 where values have both signs; else sequential, logarithmic where they span far."""
    low, high = min(map(np.nanmin, tables)), max(map(np.nanmax, tables))
    if low < 0 < high:
        return around_zero(tables, "RdBu_r")
    norm = LogNorm if low > 0 and high > LOG_FACTOR * low else Normalize
    return ScalarMappable(norm(low, high if high > low else low + (abs(low) or 1.0)), MAP)


def around_zero(tables: Sequence[pd.DataFrame], name: str) -> ScalarMappable:
    most = max(np.nanmax(np.abs(table)) for table in tables) or 1.0
    return ScalarMappable(Normalize(-most, most), name)


def short(value: float) -> str:
    """`0.083`, `3.0`, `110`: two significant digits."""
    if value and not 1e-3 <= abs(value) < 1e4:
        return value_label(float(f"{value:.1e}")).replace("-", "−")
    digits = 1 - math.floor(math.log10(abs(value))) if value else 0
    return number(value, digits).replace(",", "")
