"""The look that the figures share: seaborn's theme, one look for each setting, panels and scales. Imports seaborn."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg", force=False)

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from lorabench.report.aggregate import LARGEST
from lorabench.report.results import Results, grouped, ordered

COLUMN_INCHES = 3.3
PAGE_INCHES = 6.9
INCHES = {"column": COLUMN_INCHES, "page": PAGE_INCHES}
RANK = "method.rank"
COLORS = [to_hex(sns.color_palette("colorblind")[i]) for i in (0, 3, 2, 4, 1, 9, 5)]
"""Of seaborn's palette for the colour-blind, less the yellow and pink that print loses and the grey of chance."""
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
DASHES: list[Any] = ["-", (0, (7, 1.5)), (0, (5, 1, 1, 1)), (0, (1, 1))]
REFERENCE = "#6B6B6B"
NULL_DASHES = (0, (3, 2))
"""Of what chance gives."""
LOG_FACTOR = 20
POINTS = 7
"""The smallest text, in print."""
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.labelsize": 7.5,
    "axes.titlesize": 7.5,
    "axes.titleweight": "bold",
    "xtick.labelsize": POINTS,
    "ytick.labelsize": POINTS,
    "legend.fontsize": POINTS,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "black",
    "axes.linewidth": 0.7,
    "axes.formatter.useoffset": False,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "xtick.bottom": True,
    "ytick.left": True,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 250,
    "figure.dpi": 150,
    "pdf.fonttype": 42,
    "svg.hashsalt": "lorabench",
    "text.parse_math": False,  # a label with two dollars is no formula
}


@dataclass(frozen=True)
class Look:
    """How one series is drawn: colour and marker both tell it apart."""

    color: str
    marker: str
    dashes: Any = "-"

    @property
    def handle(self) -> Line2D:
        """For a legend."""
        return Line2D([], [], color=self.color, marker=self.marker, linestyle=self.dashes, markersize=4)

    @property
    def handle_alone(self) -> Line2D:
        """Of points without a line."""
        return replace(self, dashes="none").handle


@contextmanager
def style(kind: str = "whitegrid") -> Iterator[None]:
    """seaborn's theme with our sizes inside, and nothing of the caller's settings; `white` has no grid."""
    with plt.rc_context():
        plt.rcdefaults()
        sns.set_theme(context="paper", style=kind, palette=COLORS, rc=STYLE)
        yield


def looks(series: Iterable[Any]) -> dict[Any, Look]:
    """Each series another pair of colour and marker, as long as there are any (49)."""
    return {
        name: Look(
            COLORS[i % len(COLORS)],
            MARKERS[(i + i // len(COLORS)) % len(MARKERS)],
            DASHES[i // len(COLORS) % len(DASHES)],
        )
        for i, name in enumerate(series)
    }


@dataclass(frozen=True, eq=False)
class SettingLooks:
    """The look of each setting of a sweep, one table for all its figures, whichever of them these show.

    Settings that differ in nothing but their rank are a family: one colour, marker and dash, darker with the rank.
    """

    families: dict[tuple[Any, ...], Look]
    ranks: list[Any]

    def __call__(self, values: dict[str, Any]) -> Look:
        """Of a setting, by its values of `results.settings`; of a family where the rank is left out."""
        family = self.families[tuple(value for key, value in values.items() if key != RANK)]
        return replace(family, color=self.shade(family.color, values.get(RANK)))

    def shade(self, color: str, rank: Any) -> str:
        """Lightness tells the rank, from light to dark."""
        if rank is None or len(self.ranks) < 2:
            return color
        return to_hex(sns.set_hls_values(color, l=0.68 - 0.40 * self.ranks.index(rank) / (len(self.ranks) - 1)))


def setting_looks(results: Results) -> SettingLooks:
    """From all runs of the sweep, done or not, so that a look stays as runs end."""
    families = grouped(results.runs, [key for key in results.settings if key != RANK])
    ranks = ordered(results.runs[RANK].dropna()) if RANK in results.settings else []
    return SettingLooks(looks(values for values, _ in families), ranks)


def facets(
    names: Iterable[str], width: str | None = None, *, height: float = 2.3, columns: int | None = None, **shared: bool
) -> sns.FacetGrid:
    """A panel for each of the names, which are their titles and the keys of `axes_dict`; `height` inches a row.

    One print column wide for a single panel and the page wide for more, unless `width` says which. So many `columns`
    of panels on the page; in a print column they stand one below the other.
    """
    names = list(names)
    inches = INCHES[width or ("column" if len(names) == 1 else "page")]
    columns = (columns or panel_columns(len(names))) if inches == PAGE_INCHES else 1
    with plt.rc_context({"figure.constrained_layout.use": False}):  # else seaborn's own layout warns of it
        grid = sns.FacetGrid(
            pd.DataFrame({"panel": names}), col="panel", col_order=names, col_wrap=columns, height=height,
            aspect=inches / columns / height, **{"sharex": True, "sharey": True, **shared},
        )  # fmt: skip
    grid.figure.set_layout_engine("constrained")
    grid.figure.set_size_inches(inches, height * -(-len(names) // columns))
    for place, (name, axes) in enumerate(grid.axes_dict.items()):
        axes.set_title(wrapped(name, int(15 * inches / columns)))
        axes.tick_params(
            labelbottom=place + columns >= len(names) or not shared.get("sharex", True),
            labelleft=place % columns == 0 or not shared.get("sharey", True),
        )  # else ticks that are set later have labels inside too
    grid.set_axis_labels("", "")
    return grid


def new_figure(rows: int, columns: int, *, height: float = 2.3, **options: Any) -> tuple[Figure, np.ndarray]:
    """A grid of panels, one print column wide for a single panel and the page wide for more; `height` a row."""
    width = COLUMN_INCHES if columns == 1 else PAGE_INCHES
    return plt.subplots(rows, columns, figsize=(width, height * rows), squeeze=False, **options)


def panel_columns(count: int) -> int:
    """Four panels stand as two by two, others three in a row at most."""
    return 2 if count == 4 else min(3, count)


def lowest(grid: np.ndarray, count: int) -> list[Axes]:
    """Hide the places beyond the first `count`; the lowest panel of each column, with its tick labels."""
    for axes in list(grid.flat)[count:]:
        axes.set_visible(False)
    panels = [[axes for axes in column if axes.get_visible()][-1] for column in grid.T]
    for axes in panels:
        axes.tick_params(labelbottom=True)
    return panels


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem.pdf` and `stem.png` (250 dpi); the same figure gives the same bytes."""
    files = [stem.with_suffix(".pdf"), stem.with_suffix(".png")]
    stem.parent.mkdir(parents=True, exist_ok=True)
    try:
        with style():
            figure.savefig(files[0], metadata={"CreationDate": None, "Creator": "lorabench", "Producer": None})
            figure.savefig(files[1], metadata={"Software": None})
    except BaseException:
        for file in files:
            file.unlink(missing_ok=True)
        raise
    finally:
        plt.close(figure)
    return files


def legend_below(figure: Figure, handles: dict[str, Any]) -> None:
    """A legend of label -> handle under the panels, where it covers no data."""
    wide = figure.get_figwidth() > COLUMN_INCHES
    longest = max(map(len, handles), default=1)
    fitting = max(1, int((110 if wide else 52) / (longest + 7)))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=min(len(handles), fitting))


def null_handle(label: str) -> dict[str, Line2D]:
    """An entry for the legend: dashed is chance."""
    return {label: Line2D([], [], color=REFERENCE, linestyle=NULL_DASHES, linewidth=0.9)}


def whole_numbers(axis: Axis, most: int = 5) -> None:
    axis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))


def powers_of_two(axes: Axes, values: Iterable[float]) -> None:
    """A log2 axis that is marked at the values that were run, thinned until they fit."""
    marks = sorted(set(values))
    while len(marks) > 8:
        marks = marks[::-2][::-1]
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(marks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def plain_logarithmic(axis: Axis) -> None:
    """A log axis with its numbers written out: decades, and more between them where there are few."""
    low, high = axis.get_view_interval()
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high < 10 * low else (1.0, 2.0, 5.0) if high < 200 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def wrapped(text: str, width: int) -> str:
    """The text in lines of at most `width` characters."""
    return textwrap.fill(text, width)


def finite(runs: pd.DataFrame, name: str) -> pd.DataFrame:
    """The runs whose measure can be drawn: there, not infinite, and within what an axis can show."""
    return runs[runs[name].abs() < LARGEST] if name in runs else runs.iloc[:0]


def limit(panels: Sequence[Axes], which: str = "y", *, logs: bool = True) -> None:
    """The range of all that is drawn; with `logs` a log axis where the means span more than a factor of LOG_FACTOR.

    Of wide intervals no more than once the means' own range is shown, and what is positive by nature keeps to
    positive numbers, however wide its interval. The panels share the axis.
    """
    place = "xy".index(which)
    lines = [
        np.asarray(line.get_xydata(), float)[:, place]
        for axes in panels
        for line in axes.lines
        if line.get_transform().contains_branch_seperately(axes.transData)[place]
    ]
    means, axis = np.concatenate(lines or [np.array([])]), getattr(panels[0], f"{which}axis")
    means = means[np.isfinite(means)]
    setter = getattr(panels[0], f"set_{which}lim")
    if not len(means):
        return
    low, high = means.min(), means.max()
    if logs and low > 0 and high > LOG_FACTOR * low:
        getattr(panels[0], f"set_{which}scale")("log")
        setter(low / 1.4, high * 1.4)
        plain_logarithmic(axis)
        return
    ends = np.array([getattr(axes.dataLim, f"interval{which}") for axes in panels if axes.lines])
    room = max(high - low, 1e-3 * max(abs(low), abs(high)))
    bottom, top = max(ends.min(), low - room), min(ends.max(), high + room)
    margin = 0.06 * (top - bottom) or 1e-9
    setter(max(0.0, bottom - margin) if low > 0 else bottom - margin, top + margin)


def place_labels(axes: Axes, points: pd.DataFrame) -> None:
    """Write each `text` beside its point, where it is furthest from other points, their intervals and other texts.

    `points` has the columns x, y, text, color, and the ends x_low, x_high, y_low and y_high of the intervals.
    """
    axes.figure.canvas.draw()
    unit, box = axes.figure.dpi / 72, axes.get_window_extent()
    spots = axes.transData.transform(points[["x", "y"]].to_numpy(float))
    taken: list[np.ndarray] = []
    for p in points.itertuples():
        taken += list(axes.transData.transform([(x, p.y) for x in np.linspace(p.x_low, p.x_high, 25)]))
        taken += list(axes.transData.transform([(p.x, y) for y in np.linspace(p.y_low, p.y_high, 25)]))
    for spot, (x, y, text, color) in zip(spots, points[["x", "y", "text", "color"]].to_numpy(), strict=True):
        rooms = {side: _room(spot + unit * np.array(side), taken, box) for side in _sides(text)}
        best = max(rooms, key=rooms.__getitem__)
        taken.append(spot + unit * np.array(best))
        axes.annotate(
            text, (x, y), xytext=best, textcoords="offset points", color=color, fontsize=POINTS,
            ha="center", va="center", annotation_clip=False,
        )  # fmt: skip


def _sides(text: str) -> list[tuple[float, float]]:
    """Offsets of a label's middle from its point, in points: a ring as near as the text's width allows, and a wider."""
    across = 4.5 + 2.1 * len(text)
    angles = [math.pi / 8 * k for k in (2, 6, 10, 14, 0, 4, 8, 12)]
    return [(r * across * math.cos(angle), r * 8 * math.sin(angle)) for r in (1.0, 1.5) for angle in angles]


def _room(place: np.ndarray, taken: Sequence[np.ndarray], box: Any) -> float:
    """Distance to what is nearest, text being wider than high; a place outside the panel is a bad one."""
    distances = [math.hypot((place[0] - other[0]) / 1.4, place[1] - other[1]) for other in taken]
    outside = not (box.x0 < place[0] < box.x1 and box.y0 < place[1] < box.y1)
    return min(min(distances, default=math.inf), 16.0) - 100.0 * outside
