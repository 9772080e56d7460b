"""Tables as colours, with a number in each cell where there is room. Imports seaborn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize

from lorabench.report.aggregate import number
from lorabench.report.drawing import LOG_FACTOR, POINTS, plain_logarithmic
from lorabench.report.labels import value_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar

MAP = "viridis"
ROUND = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
BAR_INCHES = 1.4
"""Of a figure's width, what its colour bar and the labels at its left take."""


def draw_table(axes: Axes, table: pd.DataFrame, colors: ScalarMappable, texts: pd.DataFrame | None = None) -> None:
    """A cell a number, its colour that of `colors` and in it its text; the columns' names below, the index at the left.

    What is missing stays empty, over hatching.
    """
    size = table.shape[::-1]
    axes.add_patch(_hatched(size))
    sns.heatmap(
        table.astype(float), ax=axes, cmap=colors.cmap, norm=colors.norm, cbar=False, rasterized=True, zorder=2,
        annot=None if texts is None else texts.to_numpy(), fmt="", annot_kws={"size": POINTS, "zorder": 3},
        xticklabels=False, yticklabels=False,
    )  # fmt: skip
    for axis, names in ((axes.xaxis, table.columns), (axes.yaxis, table.index)):
        places = _marked(list(names))
        axis.set_ticks([place + 0.5 for place in places], [str(names[place]) for place in places])
        axis.label.set_text("")
    axes.tick_params(length=0, labelrotation=0)


def _marked(names: Sequence[Any], most: int = 6) -> list[int]:
    """Places of the names that stand at an axis: all words, of many numbers the multiples of one."""
    if len(names) <= most or not all(isinstance(name, int | np.integer) for name in names):
        return list(range(len(names)))
    found = ([place for place, name in enumerate(names) if name % step == 0] for step in itertools.count(2))
    return next(places for places in found if len(places) <= most)


def draw_bar(axes: Iterable[Axes], colors: ScalarMappable, label: str, **options: Any) -> Colorbar:
    """The scale beside these panels, marked at both its ends where it begins at 0."""
    panels = list(axes)
    bar = panels[0].figure.colorbar(colors, ax=panels, label=label, **{"pad": 0.01, "aspect": 16, **options})
    bar.outline.set_visible(False)
    if isinstance(colors.norm, LogNorm):
        plain_logarithmic(bar.ax.yaxis)
    elif colors.norm.vmin == 0:
        marks = np.linspace(0, colors.get_clim()[1] or 1.0, 5)
        bar.set_ticks(marks.tolist(), labels=[f"{mark:.3g}" for mark in marks])
    return bar


def from_zero(tables: Iterable[Any], most: float = math.inf) -> ScalarMappable:
    """From 0 to the largest number in the tables, rounded up, but no further than `most`."""
    largest = max((float(np.nanmax(np.asarray(table, float))) for table in tables if np.size(table)), default=1.0)
    return ScalarMappable(Normalize(0, min(most, rounded_up(largest))), MAP)


def rounded_up(value: float) -> float:
    """`0.083` -> 0.1, `0.41` -> 0.5: what a scale ends at."""
    if not value > 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return float(f"{next(step for step in ROUND if step * unit >= value * (1 - 1e-9)) * unit:.2g}")


def spanning(tables: Sequence[np.ndarray]) -> ScalarMappable:
    """Diverging around 0 where values have both signs; else sequential, logarithmic where they span far."""
    low, high = min(map(np.nanmin, tables)), max(map(np.nanmax, tables))
    if low < 0 < high:
        return around_zero(max(-low, high), "RdBu_r")
    norm = LogNorm if low > 0 and high > LOG_FACTOR * low else Normalize
    return ScalarMappable(norm(low, high if high > low else low + (abs(low) or 1.0)), MAP)


def around_zero(most: float, name: str) -> ScalarMappable:
    return ScalarMappable(Normalize(-most, most), name)


def fitting(tables: Sequence[pd.DataFrame], inches: tuple[float, float], show: Any = None) -> list[Any]:
    """The texts of the tables' cells, where the widest fits into a cell of panels of that size; else None for each."""
    texts = [table.map(lambda value: "" if value != value else (show or short)(float(value))) for table in tables]
    widest = max((len(text) for table in texts for text in table.to_numpy().flat), default=0)
    rows, columns = (max(len(table.axes[axis]) for table in tables) for axis in (0, 1))
    has_room = widest * 0.62 * POINTS + 3 <= 72 * inches[0] / columns and 72 * inches[1] / rows >= POINTS + 3
    return texts if has_room else [None] * len(texts)


def cell_room(grid: Any, height: float) -> tuple[float, float]:
    """Inches across and down that a panel has for its cells, about: beside labels, titles and the bar."""
    columns = len(grid._bottom_axes)
    return (grid.figure.get_figwidth() - BAR_INCHES) / columns - 0.1, height - 0.4


def short(value: float) -> str:
    """`0.083`, `3.0`, `110`: two significant digits."""
    if value and not 1e-3 <= abs(value) < 1e4:
        return value_label(float(f"{value:.1e}")).replace("-", "−")
    digits = 1 - math.floor(math.log10(abs(value))) if value else 0
    return number(value, digits).replace(",", "")


def _hatched(size: tuple[int, ...]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((0, 0), *size, fill=False, hatch="/////", edgecolor="#C4C4C4", linewidth=0)
