"""The look that the figures share: seaborn's theme, one look for each setting, panels and scales. Imports seaborn."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

if matplotlib.get_backend(auto_select=False) is None:  # a notebook's own stays
    matplotlib.use("Agg")

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from lorabench.config.decode import InputError
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
    "axes.edgecolor": "black",
    "axes.titleweight": "bold",
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "legend.handlelength": 1.8,
    "savefig.dpi": 250,
    "figure.dpi": 150,
    "pdf.fonttype": 42,
    "svg.hashsalt": "lorabench",
    "text.parse_math": False,  # a label with two dollars is no formula
    "figure.constrained_layout.use": True,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.formatter.useoffset", "legend.frameon"), False),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.7),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 3),
    **dict.fromkeys(("xtick.bottom", "ytick.left"), True),
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


FREE_INCHES = 0.4
"""Height of a legend of two lines, for which figures have room."""
NULL = Look(REFERENCE, "", NULL_DASHES)
"""In legends: dashed is chance."""


@contextmanager
def style(kind: str = "whitegrid") -> Iterator[None]:
    """seaborn's theme with our sizes inside, and nothing of the caller's settings; `white` has no grid."""
    with plt.rc_context():
        plt.rcdefaults()
        sns.set_theme(context="paper", style=kind, palette=COLORS, font="DejaVu Sans", font_scale=0.8, rc=STYLE)
        yield


def looks(series: Iterable[Any]) -> dict[Any, Look]:
    """Each series another pair of colour and marker, as long as there are any (49)."""
    places = {name: (i, i // len(COLORS)) for i, name in enumerate(series)}
    return {
        name: Look(COLORS[i % len(COLORS)], MARKERS[(i + turn) % len(MARKERS)], DASHES[turn % len(DASHES)])
        for name, (i, turn) in places.items()
    }


@dataclass(frozen=True, eq=False)
class SettingLooks:
    """The look of each setting of a sweep, one table for all its figures, whichever of them these show.

    Settings that differ in nothing but their rank are a family: one colour, marker and dash, darker with the rank.
    """

    keys: list[str]
    """What tells families apart."""
    families: dict[tuple[Any, ...], Look]
    ranks: list[Any]
    fixed: dict[str, Any]
    """What all runs that are shown have in common, of the keys."""

    def __call__(self, values: Mapping[Any, Any]) -> Look:
        """Of a setting, by its values of `results.settings`; of a family where the rank is left out."""
        known = self.fixed | dict(values.items())
        return self.shade(self.families[tuple(known[key] for key in self.keys)], values.get(RANK))

    def shade(self, look: Look, rank: Any) -> Look:
        """Lightness tells the rank, from light to dark."""
        if rank is None or len(self.ranks) < 2:
            return look
        lightness = 0.68 - 0.40 * self.ranks.index(rank) / (len(self.ranks) - 1)
        return replace(look, color=to_hex(sns.set_hls_values(look.color, l=lightness)))


def setting_looks(results: Results) -> SettingLooks:
    """From all runs of the sweep, done or not and shown or not, so that a look stays as runs end."""
    whole = results.whole or results
    keys = [key for key in whole.settings if key != RANK]
    families = looks(values for values, _ in grouped(whole.runs, keys))
    ranks = ordered(whole.runs[RANK].dropna()) if RANK in whole.settings else []
    alike = [key for key in keys if key not in results.settings]
    fixed = {key: results.runs[key].iloc[0] for key in alike if len(results.runs)}
    return SettingLooks(keys, families, ranks, fixed)


_CANVAS: ContextVar[Axes | FigureBase | None] = ContextVar("canvas", default=None)
"""A person's own, on which figures are drawn instead of on new ones, in the person's own style."""


@contextmanager
def onto(canvas: Axes | FigureBase) -> Iterator[None]:
    """Inside, figures are drawn on these axes, or in this figure or subfigure. InputError where axes are not enough."""
    token = _CANVAS.set(canvas)
    try:
        with plt.rc_context({"text.parse_math": False}):
            yield
    finally:
        _CANVAS.reset(token)


class Panels:
    """What figures use of a `FacetGrid`, on a person's own canvas."""

    def __init__(self, canvas: Axes | FigureBase, names: Sequence[str], columns: int, **shared: bool):
        if isinstance(canvas, Axes) and len(names) > 1:
            raise InputError(f"ax: the figure has {len(names)} panels; give it fig=, a Figure or a SubFigure")
        self.ncols, self.nrows = columns, -(-len(names) // columns)
        if isinstance(canvas, Axes):
            self.figure: Any = canvas.figure
            panels = [canvas]
        else:
            self.figure = canvas
            sharing: dict[str, Any] = {"sharex": True, "sharey": True, **shared}
            panels = [*canvas.subplots(self.nrows, columns, squeeze=False, **sharing).flat]
            for unused in panels[len(names) :]:
                unused.remove()
        self.axes = np.array(panels[: len(names)], dtype=object)
        self.axes_dict = dict(zip(names, self.axes, strict=True))

    def set(self, **properties: Any) -> Panels:
        for axes in self.axes.flat:
            axes.set(**properties)
        return self

    def set_xlabels(self, label: str) -> None:
        for place, axes in enumerate(self.axes.flat):
            axes.set_xlabel(label if place + self.ncols >= len(self.axes) else "")

    def set_ylabels(self, label: str) -> None:
        for place, axes in enumerate(self.axes.flat):
            axes.set_ylabel(label if place % self.ncols == 0 else "")

    def set_axis_labels(self, x: str, y: str) -> None:
        self.set_xlabels(x)
        self.set_ylabels(y)


class _Grid(sns.FacetGrid):
    """Without seaborn's own layout, which takes as long as drawing a panel, and of which the constrained one leaves
    nothing."""

    def tight_layout(self, *_: Any, **__: Any) -> _Grid:
        return self


def inches(figure: FigureBase) -> tuple[float, float]:
    """Width and height, of a subfigure too."""
    return figure.bbox.width / figure.dpi, figure.bbox.height / figure.dpi  # type: ignore[attr-defined]


@contextmanager
def facets(
    names: Iterable[str], width: str | None = None, *, height: float = 2.3, columns: int | None = None,
    theme: str = "whitegrid", **shared: bool,
) -> Iterator[Any]:  # fmt: skip
    """A panel for each of the names, which are their titles and the keys of `axes_dict`; inside, the theme holds.

    A seaborn `FacetGrid`, or inside `onto` what is like it. One print column wide for a single panel and the page wide
    for more, unless `width` says which, and `height` inches a row. So many `columns` of panels on the page (else four
    as two by two, others three in a row); in a print column one below the other.
    """
    names = list(names)
    wide = INCHES[width or ("column" if len(names) == 1 else "page")]
    columns = 1 if wide == COLUMN_INCHES else columns or (2 if len(names) == 4 else min(3, len(names)))
    if (canvas := _CANVAS.get()) is not None:
        grid: Any = Panels(canvas, names, columns, **shared)
        _prepare(grid, names, columns, shared)
        yield grid
        return
    how: dict[str, Any] = {"col_order": names, "col_wrap": columns, "height": height, **shared}
    with style(theme):
        grid = _Grid(pd.DataFrame({"panel": names}), col="panel", **how)
        grid.figure.set_layout_engine("constrained")
        grid.figure.set_size_inches(wide, height * -(-len(names) // columns))
        _prepare(grid, names, columns, shared)
        yield grid


def _prepare(grid: Any, names: Sequence[str], columns: int, shared: Mapping[str, bool]) -> None:
    for place, (name, axes) in enumerate(grid.axes_dict.items()):
        axes.set_title(name)
        axes.tick_params(
            labelbottom=place + columns >= len(names) or not shared.get("sharex", True),
            labelleft=place % columns == 0 or not shared.get("sharey", True),
        )  # else ticks that are set later have labels inside too
    grid.set_axis_labels("", "")


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem.pdf` and `stem.png` (250 dpi), laid out once; the same figure gives the same bytes."""
    files = [stem.with_suffix(".pdf"), stem.with_suffix(".png")]
    stem.parent.mkdir(parents=True, exist_ok=True)
    try:
        with style():
            wrap_titles(figure)
            figure.savefig(files[1], metadata={"Software": None})
            figure.set_layout_engine("none")  # it stays as it is laid out, for that takes time
            with _glyphs_alone():
                figure.savefig(files[0], metadata={"CreationDate": None, "Creator": "lorabench", "Producer": None})
    except BaseException:
        for file in files:
            file.unlink(missing_ok=True)
        raise
    finally:
        plt.close(figure)
    return files


@contextmanager
def _glyphs_alone() -> Iterator[None]:
    """Of a font a PDF needs the glyphs, not how they are put together, which is done: a fifth of all the time."""
    from fontTools.subset import Options

    dropped = getattr(Options, "_drop_tables_default", [])
    Options._drop_tables_default = [*dropped, "GDEF", "GPOS", "GSUB"]
    try:
        yield
    finally:
        Options._drop_tables_default = dropped


def finish(figure: Figure) -> None:
    """Lay a figure out that is not saved, and leave it to who has it: pyplot would show it a second time."""
    with style():
        wrap_titles(figure)
    plt.close(figure)


def legend_below(figure: Figure, entries: Mapping[str, Any], null: str | None = None, *, lines: bool = True) -> None:
    """A legend of label -> look (or handle) under the panels, where it covers no data: a figure grows by what is more
    than two lines, so that the panels stay as high as they are.

    `null`: what is dashed. Without `lines` a look stands for points alone.
    """
    entries = {**entries, **({null: NULL} if null else {})}
    looks = [look if lines or not isinstance(look, Look) else replace(look, dashes="none") for look in entries.values()]
    handles = [look.handle if isinstance(look, Look) else look for look in looks]
    if isinstance(canvas := _CANVAS.get(), Axes):  # of which nothing is outside
        canvas.legend(handles, list(entries))
        return
    wide = inches(figure)[0] > COLUMN_INCHES
    labels = [wrapped(label, 110 if wide else 48) for label in entries]
    longest = max((len(line) for label in labels for line in label.splitlines()), default=1)
    num_columns = min(len(handles), max(1, int((124 if wide else 60) / (longest + 7))))
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=num_columns)
    while num_columns > 1 and legend.get_window_extent().width > figure.bbox.width:
        legend.remove()
        num_columns -= 1
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=num_columns)
    if isinstance(figure, Figure):
        higher = legend.get_window_extent().height / figure.dpi - FREE_INCHES
        figure.set_size_inches(figure.get_figwidth(), figure.get_figheight() + max(0.0, higher))


def whole_numbers(axis: Axis, most: int = 5) -> None:
    axis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))


def powers_of_two(axes: Axes, values: Iterable[float]) -> None:
    """A log2 axis that is marked at the values that were run: of many at powers of two, thinned until they fit."""
    marks = sorted({float(value) for value in values})
    marks = marks if len(marks) <= 8 else [mark for mark in marks if np.log2(mark).is_integer()]
    while len(marks) > 8:
        marks = marks[::-2][::-1]
    axes.set_xscale("log", base=2)
    axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
    axes.xaxis.set_minor_locator(NullLocator())


def plain_logarithmic(axis: Axis) -> None:
    """A log axis with its numbers written out: decades, and more between them where there are few."""
    low, high = axis.get_view_interval()
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high < 10 * low else (1.0, 2.0, 5.0) if high < 200 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def wrapped(text: str, width: int) -> str:
    """The text in lines of at most `width` characters."""
    return textwrap.fill(text, width)


def wrap_titles(figure: Figure) -> None:
    """Titles in as many lines as keep them apart from their neighbours' and inside the figure, once it is laid out."""
    titled = [axes for axes in figure.axes if axes.get_title()]
    if max((axes.title.get_window_extent().width for axes in titled), default=0) < figure.bbox.width / 8:
        return  # a layout takes time
    lay_out(figure)
    places = [axes.get_window_extent() for axes in titled]
    for axes, place in zip(titled, places, strict=True):
        middle = (place.x0 + place.x1) / 2
        row = [other for other in places if other.y0 < place.y1 and place.y0 < other.y1]
        beside = [abs((other.x0 + other.x1) / 2 - middle) for other in row]
        edges = [2 * middle, 2 * (figure.bbox.width - middle)]
        room = 0.96 * min(edges + [distance for distance in beside if distance > 1])
        text = axes.get_title()
        widths = iter(range(len(text), 4, -1))
        while axes.title.get_window_extent().width > room and (width := next(widths, None)):
            axes.set_title(wrapped(text, width))


def lay_out(figure: Figure) -> None:
    """Give its panels their places as drawing would, which looks at all else besides and takes twice as long."""
    if (layout := figure.get_layout_engine()) is not None:
        layout.execute(figure)
    for axes in figure.axes:
        axes.viewLim  # noqa: B018  # its limits are settled when they are asked for
        if axes.get_axes_locator() is None:
            axes.apply_aspect()


def finite(runs: pd.DataFrame, name: str) -> pd.DataFrame:
    """The runs whose measure can be drawn: there, not infinite, and within what an axis can show."""
    return runs[runs[name].abs() < LARGEST] if name in runs else runs.iloc[:0]


def limit(panels: Sequence[Axes], which: str = "y", *, logs: bool = True) -> None:
    """The range of all lines and points; with `logs` a log axis where means span more than a factor of LOG_FACTOR.

    Of wide intervals no more than once the means' own range is shown, and what is positive by nature keeps to
    positive numbers, however wide its interval. The panels share the axis.
    """
    place, first = "xy".index(which), panels[0]
    lines = [np.asarray(line.get_xydata(), float)[:, place] for axes in panels for line in axes.lines]
    means = np.concatenate(lines or [np.array([])])
    means = means[np.isfinite(means)]
    if not len(means):
        return
    low, high = means.min(), means.max()
    if logs and low > 0 and high > LOG_FACTOR * low:
        first.set(**{f"{which}scale": "log", f"{which}lim": (low / 1.4, high * 1.4)})
        plain_logarithmic(getattr(first, f"{which}axis"))
        return
    ends = np.array([getattr(axes.dataLim, f"interval{which}") for axes in panels if axes.lines])
    room = max(high - low, 1e-3 * max(abs(low), abs(high)))
    bottom, top = max(ends.min(), low - room), min(ends.max(), high + room)
    margin = 0.06 * (top - bottom) or 0.05 * abs(top) or 1e-9
    first.set(**{f"{which}lim": (max(0.0, bottom - margin) if low > 0 else bottom - margin, top + margin)})


def place_labels(axes: Axes, points: pd.DataFrame) -> None:
    """Write each `text` beside its point, where it is furthest from other points, their intervals and other texts.

    `points` has the columns x, y, text, color, and the ends x_low, x_high, y_low and y_high of the intervals.
    """
    lay_out(axes.figure.canvas.figure)
    unit, box = axes.figure.dpi / 72, axes.get_window_extent()
    bars = [
        (x, y)
        for p in points.itertuples()
        for t in np.linspace(0, 1, 25)
        for x, y in ((p.x_low + t * (p.x_high - p.x_low), p.y), (p.x, p.y_low + t * (p.y_high - p.y_low)))
    ]
    taken = axes.transData.transform(bars)
    for p in points.itertuples():
        places = axes.transData.transform((p.x, p.y)) + unit * (sides := _sides(p.text))
        gaps = (places[:, None] - taken) / (1.4, 1)  # text is wider than high
        outside = ~np.array([box.contains(*place) for place in places])
        best = np.argmax(np.hypot(*gaps.T).min(0).clip(max=16).round(1) - 100 * outside)  # ties: the first, always
        taken = np.vstack([taken, places[best]])
        how = {"color": p.color, "fontsize": POINTS, "ha": "center", "va": "center", "annotation_clip": False}
        axes.annotate(p.text, (p.x, p.y), xytext=tuple(sides[best]), textcoords="offset points", **how)


def _sides(text: str) -> np.ndarray:
    """Offsets of a label's middle from its point, in points: a ring as near as the text's width allows, and a wider."""
    angles = np.pi / 8 * np.array([2, 6, 10, 14, 0, 4, 8, 12])
    ring = np.stack([(4.5 + 2.1 * len(text)) * np.cos(angles), 8 * np.sin(angles)], axis=1)
    return np.concatenate([ring, 1.5 * ring])
