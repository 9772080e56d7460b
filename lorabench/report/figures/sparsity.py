"""How many weights a run changes in bfloat16, and how many of these are W0's principal or its smallest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.report.update_metrics import NULL, VALUE, metric_rows, per_run
from lorabench.spec.figure import Canvas, Figure, Frame

PANELS = {
    "Weights changed in bfloat16 (%)": ("changed",),
    "Of these: among W0's 30% (%)": ("changed_in_principal", "changed_in_smallest"),
}
NAMES = {
    "changed": "all weights",
    "changed_in_principal": "principal weights",
    "changed_in_smallest": "smallest weights",
}


@dataclass(frozen=True, kw_only=True)
class SparsityPoints(Figure):
    """A line a setting, a marker a set of weights."""

    section: ClassVar[str] = "base"
    most: ClassVar[int] = 12

    kinds: tuple[str, ...] = ()
    """Kinds of layers to average over, such as `q_proj` (empty: every layer that all these runs have)."""

    def draw(self, results: Any) -> Canvas | None:
        from lorabench.report import drawing
        from lorabench.report.figures._curves import SERIES, settings
        from lorabench.report.results import shared

        rows = metric_rows(results, "sparsity.changed", kinds=self.kinds)
        if rows.empty:
            return None
        tables = {
            metric: per_run(results, shared(metric_rows(results, f"sparsity.{metric}", kinds=self.kinds)), [])
            for metrics in PANELS.values()
            for metric in metrics
        }
        tables = {metric: settings(results, table, self.most)[0] for metric, table in tables.items() if len(table)}
        names = list(dict.fromkeys(tables["changed"][SERIES]))
        looks = drawing.looks([*NAMES])
        with drawing.facets(PANELS, self.width or "page", height=1.1 + 0.17 * len(names), sharex=False) as grid:
            for (label, metrics), axes in zip(PANELS.items(), grid.axes.flat, strict=True):
                for metric in metrics:
                    _points(axes, tables.get(metric), names, looks[metric])
                axes.set(title="", xlabel=label, ylabel="", ylim=(len(names) - 0.5, -0.5))
                if len(metrics) > 1:
                    axes.axvline(30, color=drawing.REFERENCE, linewidth=0.9, linestyle=drawing.NULL_DASHES, zorder=0)
                axes.grid(axis="y", visible=False)
            grid.axes.flat[0].set_yticks(range(len(names)), names)
            grid.axes.flat[0].set_ylabel("Setting")
            entries = {NAMES[metric]: looks[metric] for metric in tables}
            entries |= {"random directions": drawing.Look(drawing.REFERENCE, "|")}
            drawing.legend_below(grid.figure, entries, lines=False)
        return grid.figure

    def caption(self) -> str:
        return (
            "Left: weights whose value in bfloat16 is another after ΔW. Right: how many of these are among the 30% of "
            "W0's entries that are principal (largest in its approximation of low rank), and among its 30% smallest: "
            f"means over layers{self.of_kinds} that all runs have (where there is none: each run's own) and over "
            "seeds; by location alone it would be 30% (dashed line). Vertical dashes: ΔW's singular values in random "
            "directions, which change the smallest weights first too, since rounding hides what is small beside its "
            "weight."
        )


EXAMPLE = SparsityPoints()


def _points(axes: Any, table: Frame | None, names: list[str], look: Any) -> None:
    """The mean and interval of each setting, in %, and what chance gives."""
    import pandas as pd

    from lorabench.report.figures._curves import SERIES, draw_points, measured

    if table is None:
        return
    points = []
    for name, rows in table.groupby(SERIES, sort=False):
        rows = rows.assign(**{VALUE: 100 * rows[VALUE], NULL: 100 * rows[NULL]})
        y = dict.fromkeys(("y", "y_low", "y_high"), float(names.index(name)))
        points.append(
            measured(rows, VALUE, "x", (0, 100)) | y | {"color": look.color, "marker": look.marker, "name": name}
        )
    draw_points(axes, pd.DataFrame(points))
    for point in points:
        axes.plot(point["null"], point["y"], "|", markersize=8, color=look.color, zorder=1)
