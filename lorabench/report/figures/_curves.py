"""Lines of means over seeds with their intervals, and of what chance gives. Imports matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorabench.report.aggregate import Cell, cell
from lorabench.report.drawing import NULL_DASHES, REFERENCE
from lorabench.report.update_metrics import VALUE

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from lorabench.report.drawing import Look

Curve = list[tuple[float, Cell]]
MOST_BARS = 12
"""Points of one line whose bars can still be told apart."""


def curve(rows: pd.DataFrame, x: str) -> Curve:
    """The mean over seeds at each value of the column `x`, ascending."""
    cells = [(float(at), cell(chunk, VALUE)) for at, chunk in rows.groupby(x)]
    return [(at, item) for at, item in cells if item.mean is not None]


def draw_curve(
    axes: Axes, line: Curve, look: Look, *, shift: float | None = None, logs: bool = False, null: str | None = None
) -> Any:
    """Means as a line with a band; its null dashed, in the same colour.

    A `shift` sideways is for lines of few points with bars instead. Hollow where there is a single seed. `logs`: the
    cells hold logarithms, which are drawn as what they are of. `null`: another colour for it, where lines share one.
    """
    xs = [x + (shift or 0.0) for x, _ in line]
    show = math.exp if logs else float
    means = [show(item.center) for _, item in line]
    low = [show(item.center - (item.half or 0.0)) for _, item in line]
    high = [show(item.center + (item.half or 0.0)) for _, item in line]
    alone = all(item.half is None for _, item in line)
    style: dict[str, Any] = {"color": look.color, "marker": look.marker, "markersize": 3.2}
    style |= {"markerfacecolor": "white" if alone else look.color, "zorder": 3}
    (handle,) = axes.plot(xs, means, linestyle=look.dashes, markevery=_marked(len(xs), shift is None), **style)
    if shift is not None and len(xs) <= MOST_BARS:
        axes.vlines(xs, low, high, color=look.color, linewidth=0.8, zorder=2)
    else:
        axes.fill_between(xs, low, high, color=look.color, alpha=0.13, linewidth=0)
    chance = [(x, show(item.null)) for x, (_, item) in zip(xs, line, strict=True) if item.null is not None]
    draw_null(axes, chance, null or look.color)
    return handle


def draw_null(axes: Axes, points: Sequence[tuple[float, float]], color: str) -> None:
    """What chance gives, dashed; a single point as a dash."""
    if len(points) == 1:
        axes.plot(*points[0], color=color, marker="_", markersize=8, linestyle="none", zorder=2)
    elif points:
        axes.plot(*zip(*points, strict=True), color=color, linestyle=NULL_DASHES, linewidth=0.9, zorder=2)


def null_handle(label: str) -> dict[str, Any]:
    """An entry for the legend: dashed is chance."""
    from matplotlib.lines import Line2D

    return {label: Line2D([], [], color=REFERENCE, linestyle=NULL_DASHES, linewidth=0.9)}


def has_null(lines: Sequence[Curve]) -> bool:
    return any(item.null is not None for line in lines for _, item in line)


def _marked(count: int, is_log: bool) -> list[int]:
    """Every point of a short line; of a long one a few, at powers of two where it is drawn over their logarithm."""
    if count <= MOST_BARS:
        return list(range(count))
    return [2**k - 1 for k in range(count.bit_length()) if 2**k <= count] if is_log else [*range(0, count, count // 6)]
