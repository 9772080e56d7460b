"""Means over seeds with their intervals, as lines and as points, and what chance gives. Imports seaborn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
import seaborn as sns

from lorabench.report.aggregate import FEWEST, FREE, cell, drawn_interval
from lorabench.report.drawing import NULL_DASHES, Look, setting_looks
from lorabench.report.hover import name_points
from lorabench.report.results import kept_rows
from lorabench.report.update_metrics import NULL, VALUE, by_setting, shown_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = "series"
Looks = dict[str, Look]
IN_PANEL = ("method.name", "quantization")
"""Keys whose settings stand in one panel."""
MOST_BARS = 12
"""Points of one line whose bars, and whose markers, can still be told apart."""


def settings(results: Any, rows: pd.DataFrame, most: int = 10**6) -> tuple[pd.DataFrame, Looks]:
    """The rows of the settings that there is room for, with what each is called as `series`, and their looks."""
    look = setting_looks(results)
    rows = rows.copy()  # of a sweep's many columns, joined one by one, each chunk would else be put together anew
    groups = by_setting(results, rows, shown_settings(results, rows, most))
    looks = {label: look(chunk.iloc[0][results.settings]) for label, chunk in groups}
    return pd.concat([chunk.assign(**{SERIES: label}) for label, chunk in groups]), looks


def alike(rows: pd.DataFrame, place: Mapping[str, Any]) -> pd.DataFrame:
    """The rows of a panel: those that have its values, or no such key (full fine-tuning has no targets)."""
    for key, value in place.items():
        if key not in IN_PANEL:
            rows = kept_rows(rows, (item is None or item == value for item in rows[key]))
    return rows


def draw_lines(
    axes: Axes, rows: pd.DataFrame, looks: Looks, x: str, *, apart: float | None = None,
    within: tuple[float, float] = FREE, null: str | None = None,
) -> None:  # fmt: skip
    """A line a series over the column `x`: the mean over seeds, its interval as a band, and its null, dashed.

    Of the logarithm, on an axis that is logarithmic already. `apart`: instead of a band bars, where points are few,
    and so far apart stand neighbouring lines. `null`: one colour for the nulls of all lines. Fewer than FEWEST seeds
    are dots, and their mean is hollow.
    """
    rows = rows.reindex(columns=[SERIES, x, "seed", VALUE, NULL]).dropna(subset=VALUE)
    rows = rows.astype(dict.fromkeys([x, VALUE, NULL], float))
    rows = rows.groupby([SERIES, x, "seed"], as_index=False)[[VALUE, NULL]].mean()  # of several runs of one seed
    rows[x] += rows[SERIES].map({name: (apart or 0.0) * (i - (len(looks) - 1) / 2) for i, name in enumerate(looks)})
    draw_null(axes, rows.dropna(subset=NULL), x, NULL, {name: null or look.color for name, look in looks.items()})
    band: dict[str, Any] = {"err_style": "band", "err_kws": {"alpha": 0.13, "linewidth": 0}}
    bars = band if apart is None else {"err_style": "bars", "err_kws": {"linewidth": 0.8}}
    for name, look in looks.items():
        line = rows[rows[SERIES] == name]
        if line.empty:
            continue
        seeds, is_short = line.groupby(x)["seed"].transform("size"), line[x].nunique() <= MOST_BARS
        _draw_mean(
            axes, line, look, x, VALUE, errorbar=lambda values: drawn_interval(values, within),
            markerfacecolor="white" if seeds.max() < FEWEST else look.color, **(bars if is_short else band),
        )  # fmt: skip
        axes.lines[-1].set_label(name)
        means = pd.DataFrame(axes.lines[-1].get_xydata(), columns=[x, VALUE])
        hollow = means[means[x].isin(line[seeds < FEWEST][x]) & is_short]
        how: dict[str, Any] = {"x": x, "y": VALUE, "ax": axes, "legend": False, "zorder": 3.5}
        dots = line[seeds.between(2, FEWEST - 1) & is_short]
        if len(dots):  # seaborn takes as long over none
            sns.scatterplot(dots, color=look.color, s=7, linewidth=0, **how)
        if len(hollow):
            edge: dict[str, Any] = {"facecolor": "white", "edgecolor": look.color, "linewidth": 0.9}
            sns.scatterplot(hollow, marker=look.marker, s=13, **edge, **how)


def draw_curve(
    axes: Axes, rows: pd.DataFrame, look: Look, x: str, y: str = VALUE, null: str = NULL, **options: Any
) -> None:
    """The mean of `y` at each x, and that of its null; `options` go to seaborn's lineplot."""
    draw_null(axes, rows.dropna(subset=null), x, null, look.color)
    _draw_mean(axes, rows, look, x, y, **options)


def draw_null(axes: Axes, rows: pd.DataFrame, x: str, y: str, color: str | dict[str, str]) -> None:
    """What chance gives at each x, dashed; at a single x as a dash; where there are `series`, each in its colour."""
    if isinstance(color, str):
        rows, color = rows.assign(**{SERIES: ""}), {"": color}
    is_single = rows.groupby(SERIES)[x].transform("nunique") == 1
    for chunk, marker in ((rows[~is_single], ""), (rows[is_single], "_")):
        if len(chunk):
            sns.lineplot(
                chunk, x=x, y=y, hue=SERIES, palette=color, ax=axes, legend=False, errorbar=None, zorder=2,
                linestyle=NULL_DASHES, linewidth=0.9, marker=marker, markersize=8, markeredgecolor="auto",
            )  # fmt: skip


def _draw_mean(axes: Axes, rows: pd.DataFrame, look: Look, x: str, y: str, **options: Any) -> None:
    """The last of the axes' lines is then this one."""
    how: dict[str, Any] = {"markersize": 3.6, "markeredgecolor": look.color, "zorder": 3, "errorbar": None}
    sns.lineplot(
        rows, x=x, y=y, ax=axes, legend=False, color=look.color, marker=look.marker, linestyle=look.dashes,
        markevery=1 if rows[x].nunique() <= MOST_BARS else 0.1, **how | options,
    )  # fmt: skip


def measured(runs: pd.DataFrame, name: str, at: str = "y", within: tuple[float, float] | None = None) -> dict[str, Any]:
    """The mean over the runs as `y`, its interval as `y_low` and `y_high` (the mean twice, where there is none), its
    `null`, and how many `seeds`; empty where no run has it."""
    item = cell(runs, name)
    if item.mean is None:
        return {}
    half, (low, high) = item.drawn_half or 0.0, within or item.within
    ends = min(item.mean, max(item.mean - half, low)), max(item.mean, min(item.mean + half, high))
    return {at: item.mean, f"{at}_low": ends[0], f"{at}_high": ends[1], "null": item.null, "seeds": item.num_seeds}


def draw_points(axes: Axes, points: pd.DataFrame) -> None:
    """Points with their intervals both ways, hollow where the seeds are too few for one.

    Columns: x, y, with their _low and _high, seeds, color and marker; and `name`, where they have one each.
    """
    for p in points.itertuples():
        xerr, yerr = [[p.x - p.x_low], [p.x_high - p.x]], [[p.y - p.y_low], [p.y_high - p.y]]
        axes.errorbar(p.x, p.y, xerr=xerr, yerr=yerr, color=p.color, elinewidth=0.8, linestyle="none")
    looks = points.assign(few=points["seeds"] < FEWEST).groupby(["color", "marker", "few"], sort=False)
    for (color, marker, few), chunk in looks:
        sns.scatterplot(
            chunk, x="x", y="y", ax=axes, marker=marker, s=18, facecolor="white" if few else color, edgecolor=color,
            linewidth=1.0, legend=False, zorder=3,
        )  # fmt: skip
        name_points(axes, chunk.get("name", ()))
