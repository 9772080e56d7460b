"""The look that the figures share: a style, colours with markers, and where labels go. Imports matplotlib."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg", force=False)

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from lorabench.report.aggregate import LARGEST, Cell

COLUMN_INCHES = 3.3
PAGE_INCHES = 6.9
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
"""Okabe and Ito 2008, told apart by the colour-blind; yellow left out, which print loses."""
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
DASHES = ["-", "--", "-.", ":"]
REFERENCE = "#6B6B6B"
NULL_DASHES = (0, (3, 2))
"""Of what chance gives."""
LOG_FACTOR = 20
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.labelsize": 7.5,
    "axes.titlesize": 7.5,
    "axes.titleweight": "bold",
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
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
    dashes: str = "-"


@contextmanager
def style() -> Iterator[None]:
    """The style inside, and nothing of the caller's settings."""
    with plt.rc_context():
        plt.rcdefaults()
        plt.rcParams.update(STYLE)  # type: ignore[arg-type]
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


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str], columns: int | None = None) -> None:
    """A legend under the panels, where it covers no data."""
    wide = figure.get_figwidth() > COLUMN_INCHES
    longest = max(map(len, labels), default=1)
    fitting = max(1, int((110 if wide else 52) / (longest + 7)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns or min(len(labels), fitting))


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


def limit_x(axes: Axes, cells: Sequence[Cell]) -> None:
    """The range of the cells; a log axis where they span more than a factor of LOG_FACTOR."""
    means = [cell.center for cell in cells]
    if min(means) > 0 and max(means) > LOG_FACTOR * min(means):
        axes.set_xscale("log")
        axes.set_xlim(min(means) / 1.5, max(means) * 1.5)
        plain_logarithmic(axes.xaxis)
    else:
        axes.set_xlim(*_limits(cells))


def limit_y(axes: Axes, cells: Sequence[Cell]) -> None:
    axes.set_ylim(*_limits(cells))


def _limits(cells: Sequence[Cell]) -> tuple[float, float]:
    """The range of the means and their intervals, but of wide intervals no more than once the means' own range.

    What is positive by nature keeps to positive numbers, however wide its interval.
    """
    means = [cell.mean for cell in cells if cell.mean is not None]
    ends = [end for cell in cells for end in cell.ends]
    low, high = min(means), max(means)
    room = max(high - low, 1e-3 * max(abs(low), abs(high)))
    low, high = max(min(ends), low - room), min(max(ends), high + room)
    margin = 0.06 * (high - low) or 1e-9
    return (max(0.0, low - margin) if min(means) > 0 else low - margin), high + margin


def place_labels(axes: Axes, points: Sequence[tuple[Cell, Cell]], texts: Sequence[str], colors: Sequence[str]) -> None:
    """Write each text beside its point, where it is furthest from other points, their intervals and other texts."""
    axes.figure.canvas.draw()
    unit, box = axes.figure.dpi / 72, axes.get_window_extent()
    spots = axes.transData.transform([(x.center, y.center) for x, y in points])
    taken: list[np.ndarray] = []
    for x, y in points:
        steps = np.linspace(-1, 1, 25)
        taken += list(axes.transData.transform([(x.center + step * (x.half or 0), y.center) for step in steps]))
        taken += list(axes.transData.transform([(x.center, y.center + step * (y.half or 0)) for step in steps]))
    for spot, (x, y), text, color in zip(spots, points, texts, colors, strict=True):
        rooms = {side: _room(spot + unit * np.array(side), taken, box) for side in _sides(text)}
        best = max(rooms, key=rooms.__getitem__)
        taken.append(spot + unit * np.array(best))
        axes.annotate(
            text, (x.center, y.center), xytext=best, textcoords="offset points", color=color, fontsize=6.5,
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
