"""What a page tells under the pointer: the values of a figure, read off its own axes once it is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 100
"""Of one line."""
MOST_CELLS = 6000
"""Of all tables of a figure; of more of them the page tells none."""
TABLE, NAMES = "lorabench_table", "lorabench_names"
Series = dict[str, Any]


def name_cells(axes: Axes, table: pd.DataFrame) -> None:
    """Keep, with a table that has just been drawn as colours, what its rows and columns are called."""
    setattr(axes.collections[-1], TABLE, table)


def name_points(axes: Axes, names: Iterable[str]) -> None:
    """Keep, with points that have just been drawn, what each of them is called."""
    setattr(axes.collections[-1], NAMES, [*names])


def values(figure: Figure) -> list[dict[str, Any]]:
    """A panel an axes with points, lines or a table of colours, where it lies and what it shows.

    `box`: left, top, width, height as shares of the figure; `x`, `y`: the range of an axis, and whether it is
    logarithmic; `labels` of both. Then `series`, each `{name, points: [[x, y], ...]}` and, where points have names of
    their own, `names`; or `rows`, `columns` and `cells`, from top to bottom. The figure has been drawn, so
    that its layout is made.
    """
    legend = _legend(figure)
    shared = [figure.get_supxlabel(), figure.get_supylabel()]
    axes_labels = [[axes.get_xlabel(), axes.get_ylabel()] for axes in figure.axes]
    ends = [next((pair[place] for pair in axes_labels if pair[place]), shared[place]) for place in (0, 1)]
    panels, cells = [], 0
    for axes in figure.axes:
        shown = _table(axes) or _lines(axes, legend)
        cells += len(shown.get("cells", ())) * len(shown.get("columns", ()))
        if shown:
            box = axes.get_position()
            labels = [axes.get_xlabel() or ends[0], axes.get_ylabel() or ends[1]]
            panels.append({
                "box": [_short(number) for number in (box.x0, 1 - box.y1, box.width, box.height)],
                "x": [*map(_short, axes.get_xlim()), int(axes.get_xscale() == "log")],
                "y": [*map(_short, axes.get_ylim()), int(axes.get_yscale() == "log")],
                "labels": [" ".join(label.split()) for label in labels],
                "title": " ".join(axes.get_title().split()),
                **shown,
            })  # fmt: skip
    return panels if cells <= MOST_CELLS else []


def _legend(figure: Figure) -> dict[tuple[str, bool], str]:
    """What a colour, dashed or not, stands for."""
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    found: dict[tuple[str, bool], str] = {}
    for legend in (legend for legend in legends if legend):
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
            if isinstance(handle, Line2D):
                found.setdefault((to_hex(handle.get_color()), _is_chance(handle)), text.get_text())
    return found


def _is_chance(line: Line2D) -> bool:
    return line.get_linestyle() == "--" and line.get_marker() in ("", "None", None, "_")


def _table(axes: Axes) -> dict[str, Any]:
    """The cells of a table of colours; empty where there is none."""
    table = next((getattr(mesh, TABLE) for mesh in axes.collections if hasattr(mesh, TABLE)), None)
    if table is None:
        return {}
    assert isinstance(axes.collections[0], QuadMesh)
    cells = [[_short(value) if np.isfinite(value) else None for value in row] for row in table.to_numpy(float)]
    return {"rows": [*map(str, table.index)], "columns": [*map(str, table.columns)], "cells": cells}


def _lines(axes: Axes, legend: dict[tuple[str, bool], str]) -> dict[str, Any]:
    series = [each for each in _series(axes, legend) if each["points"]]
    return {"series": series} if series else {}


def _series(axes: Axes, legend: dict[tuple[str, bool], str]) -> Iterator[Series]:
    """Lines and their markers, then points that stand alone; without what only marks a place on an axis."""
    seen: set[tuple[float, ...]] = set()
    for line in axes.lines:
        is_drawn = line.get_linestyle() != "None" or line.get_marker() not in ("", "None", None)
        if is_drawn and line.get_transform() == axes.transData:
            name = _label(line.get_label()) or legend.get((to_hex(line.get_color()), _is_chance(line)), "")
            points = _points(np.asarray(line.get_xydata(), float))
            seen |= {tuple(pair) for pair in points}
            yield {"name": name or ("chance" if _is_chance(line) else ""), "points": points}
    for dots in axes.collections:
        if isinstance(dots, PathCollection) and len(dots.get_edgecolor()):
            color = to_hex(tuple(np.asarray(dots.get_edgecolor(), float)[0]))
            name = _label(dots.get_label()) or legend.get((color, False), "")
            pairs, names = np.asarray(dots.get_offsets(), float), getattr(dots, NAMES, [])
            if len(names) == len(pairs):
                yield {"name": name, "points": [[*map(_short, pair)] for pair in pairs], "names": names}
            else:
                yield {"name": name, "points": [pair for pair in _points(pairs) if tuple(pair) not in seen]}


def _label(text: Any) -> str:
    """Empty where matplotlib has made one up."""
    return "" if str(text).startswith("_") else str(text)


def _points(pairs: np.ndarray) -> list[list[float]]:
    """At most MOST_POINTS of them, the ends among them."""
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    if len(pairs) > MOST_POINTS:
        pairs = pairs[np.unique(np.linspace(0, len(pairs) - 1, MOST_POINTS).round().astype(int))]
    return [[_short(x), _short(y)] for x, y in pairs]


def _short(value: float) -> float:
    """Five significant digits."""
    return float(f"{value:.5g}")
