"""Means over seeds with their intervals, as lines and as points, and what chance gives. Imports seaborn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import seaborn as sns

from lorabench.report.aggregate import FEWEST, FREE, cell, drawn_interval, interval
from lorabench.report.drawing import NULL_DASHES, Look, setting_looks
from lorabench.report.update_metrics import NULL, VALUE, by_setting, shown_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = "series"
Looks = dict[str, Look]
MOST_BARS = 12
"""Points of one line whose bars can still be told apart."""
MOST_POINTS = 150
"""Of one line: more are not seen."""


def settings(results: Any, rows: pd.DataFrame, most: int = 10**6) -> tuple[pd.DataFrame, Looks]:
    """The rows of the settings that there is room for, with what each is called as `series`, and their looks."""
    look = setting_looks(results)
    groups = by_setting(results, rows, shown_settings(results, rows, most))
    looks = {label: look(dict(chunk.iloc[0][results.settings])) for label, chunk in groups}
    return pd.concat([chunk.assign(**{SERIES: label}) for label, chunk in groups]), looks


def handles(looks: Looks) -> dict[str, Any]:
    return {name: look.handle for name, look in looks.items()}


def draw_lines(
    axes: Axes, rows: pd.DataFrame, looks: Looks, x: str, *, bars: float | None = None, logs: bool = False,
    within: tuple[float, float] = FREE, null: str | None = None,
) -> None:  # fmt: skip
    """A line a series over the column `x`: the mean over seeds, its interval as a band, and its null, dashed.

    `bars`: instead of a band, where points are few; so far apart stand neighbouring lines. `logs`: means and intervals
    are of the logarithm. `null`: one colour for the nulls of all lines. Fewer than FEWEST seeds are drawn as points.
    """
    rows = rows[rows[SERIES].isin(looks) & rows[VALUE].notna()].astype({x: float})
    for position, (name, look) in enumerate(looks.items()):
        line = _by_seed(rows[rows[SERIES] == name], x, logs)
        if line.empty:
            continue
        if bars is not None:
            line[x] += bars * (position - (len(looks) - 1) / 2)
        _draw_line(axes, line, look, x, bars is not None, logs, within)
        chance = line.dropna(subset=[NULL])
        draw_null(axes, _means(chance[NULL], chance[x], logs), null or look.color)


def _by_seed(rows: pd.DataFrame, x: str, logs: bool) -> pd.DataFrame:
    """A row an x and seed: runs of one seed (of several settings) are averaged first."""
    names = [VALUE, NULL]
    line = rows.reindex(columns=[x, "seed", *names]).astype(dict.fromkeys([x, *names], float))
    line[names] = np.log(line[names]) if logs else line[names]
    line = line.groupby([x, "seed"], as_index=False)[names].mean()
    line[names] = np.exp(line[names]) if logs else line[names]
    return line


def _draw_line(
    axes: Axes, line: pd.DataFrame, look: Look, x: str, bars: bool, logs: bool, within: tuple[float, float]
) -> None:
    to, back = (np.log, np.exp) if logs else (np.asarray, np.asarray)
    seeds = line.groupby(x)["seed"].transform("size")
    has_bars = bars and line[x].nunique() <= MOST_BARS
    sns.lineplot(
        line, x=x, y=VALUE, ax=axes, legend=False, color=look.color, marker=look.marker, linestyle=look.dashes,
        markersize=3.6, markevery=_marked(line[x].nunique(), bars), markeredgecolor=look.color, zorder=3,
        estimator=lambda values: back(interval(to(values))[0]), err_style="bars" if has_bars else "band",
        errorbar=lambda values: tuple(back(drawn_interval(to(values), within))),
        err_kws={"linewidth": 0.8} if has_bars else {"alpha": 0.13, "linewidth": 0},
        markerfacecolor="white" if (seeds < FEWEST).all() else look.color,
    )  # fmt: skip
    _draw_few(axes, line[seeds < FEWEST], look, x, logs)


def _draw_few(axes: Axes, few: pd.DataFrame, look: Look, x: str, logs: bool) -> None:
    """Where there are too few seeds for an interval: two as dots, and their mean hollow."""
    if few.empty:
        return
    means = _means(few[VALUE], few[x], logs)
    how: dict[str, Any] = {"ax": axes, "legend": False, "zorder": 3.5}
    if len(few) > len(means):
        sns.scatterplot(few, x=x, y=VALUE, color=look.color, s=7, linewidth=0, **how)
    if len(means) <= MOST_BARS:
        sns.scatterplot(
            x=means.index, y=means, marker=look.marker, s=13, facecolor="white", edgecolor=look.color, linewidth=0.9,
            **how,
        )  # fmt: skip


def _means(values: pd.Series, x: pd.Series, logs: bool) -> pd.Series:
    """At each x: the geometric mean, where `logs`."""
    return np.exp(np.log(values).groupby(x).mean()) if logs else values.groupby(x).mean()


def draw_null(axes: Axes, points: pd.Series, color: str) -> None:
    """What chance gives, dashed; a single point as a dash."""
    if len(points) == 1:
        axes.plot(points.index, points, color=color, marker="_", markersize=8, linestyle="none", zorder=2)
    elif len(points):
        sns.lineplot(
            x=points.index, y=points, ax=axes, color=color, linestyle=NULL_DASHES, linewidth=0.9, zorder=2,
            errorbar=None, estimator=None,
        )  # fmt: skip


def has_null(rows: pd.DataFrame) -> bool:
    return NULL in rows and bool(rows[NULL].notna().any())


def measured(runs: pd.DataFrame, name: str, within: tuple[float, float] = FREE, at: str = "y") -> dict[str, Any]:
    """The mean over the runs as `y`, its interval as `y_low` and `y_high` (the mean twice, where there is none), its
    `null`, and how many `seeds`; empty where no run has it."""
    item = cell(runs, name)
    if item.mean is None:
        return {}
    half = item.drawn_half or 0.0
    low = min(item.mean, max(item.mean - half, within[0]))
    high = max(item.mean, min(item.mean + half, within[1]))
    return {at: item.mean, f"{at}_low": low, f"{at}_high": high, "null": item.null, "seeds": item.num_seeds}


def draw_points(axes: Axes, points: pd.DataFrame) -> None:
    """Points with their intervals both ways, hollow where the seeds are too few for one.

    Columns: x, y, with their _low and _high, seeds, color and marker.
    """
    spans = {which: [points[which] - points[f"{which}_low"], points[f"{which}_high"] - points[which]] for which in "xy"}
    for i, (x, y, color) in enumerate(points[["x", "y", "color"]].to_numpy()):
        xerr, yerr = ([[float(end.iloc[i])] for end in spans[which]] for which in "xy")
        axes.errorbar(x, y, xerr=xerr, yerr=yerr, color=color, elinewidth=0.8, linestyle="none")
    for (color, marker, few), chunk in points.assign(few=points["seeds"] < FEWEST).groupby(
        ["color", "marker", "few"], sort=False
    ):
        sns.scatterplot(
            chunk, x="x", y="y", ax=axes, marker=marker, s=18, facecolor="white" if few else color, edgecolor=color,
            linewidth=1.0, legend=False, zorder=3,
        )  # fmt: skip


def thinned(values: Sequence[int]) -> list[int]:
    """At most some MOST_POINTS of the ascending values, evenly over their logarithm."""
    places = np.unique(np.geomspace(1, len(values), MOST_POINTS).round().astype(int)) - 1
    return [values[place] for place in places] if len(values) > MOST_POINTS else list(values)


def _marked(count: int, bars: bool) -> list[int]:
    """Every point of a short line; of a long one a few, at powers of two where it is drawn over their logarithm."""
    if count <= MOST_BARS:
        return list(range(count))
    return [*range(0, count, count // 6)] if bars else [2**k - 1 for k in range(count.bit_length()) if 2**k <= count]
