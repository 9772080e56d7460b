"""Directions of one layer before and after: |cos| of their singular vectors, where intruders are blank columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.report.update_metrics import rows_of
from lorabench.spec.figure import Canvas, Figure, Frame

PANELS_A_ROW = 3


@dataclass(frozen=True, kw_only=True)
class CosineMap(Figure):
    """A panel a setting, of its first seed."""

    section: ClassVar[str] = "base"
    intervals: ClassVar[bool] = False
    most: ClassVar[int] = 6

    layer: str | None = None
    """The module, such as `model.layers.0.self_attn.q_proj` (None: where W0's directions are kept least)."""

    def draw(self, results: Any) -> Canvas | None:
        import pandas as pd
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        from lorabench.report import drawing
        from lorabench.report.figures._curves import SERIES, settings
        from lorabench.report.figures._heat import MAP, draw_tables

        rows = _rows(results, self.layer)
        if rows.empty:
            return None
        runs = results.runs.loc[rows["run_id"].unique()]
        chosen, looks = settings(results, runs, self.most)
        first = chosen.sort_values("seed", kind="stable").groupby(SERIES).head(1)
        tables: dict[str, pd.DataFrame] = {}
        for label in looks:
            (run_id,) = first.index[first[SERIES] == label]
            tables[label] = _table(rows[rows["run_id"] == run_id])
        columns = min(PANELS_A_ROW, len(tables))
        with drawing.facets(tables, self.width, height=2.1, columns=columns, theme="white", sharex=False) as grid:
            colors = ScalarMappable(Normalize(0, 1), MAP)
            blank = [table.map(lambda _: "") for table in tables.values()]
            draw_tables(grid.axes.flat, [*tables.values()], colors, "|cos|", texts=blank)
            for axes, table in zip(grid.axes.flat, tables.values(), strict=True):
                size = len(table)
                marks = [number for number in (1, 4, 8, 12, 16) if number < size - 1]
                axes.set_yticks([*(number - 0.5 for number in marks), size - 0.5], [*map(str, marks), "others"])
            grid.set_axis_labels("Direction of W0 + ΔW", "Direction of W0")
            grid.figure.suptitle(rows["layer"].iloc[0], fontsize=drawing.POINTS + 1)
        return grid.figure

    def caption(self) -> str:
        which = "of the layer that is named" if self.layer else "of the layer where they are kept least"
        return (
            "|cos| between the top left singular vectors of W0 and of W0 + ΔW, "
            f"{which}, of the first seed: a diagonal where ΔW changes none of them. `others`: the nearest of all the "
            "other directions of W0. A column that is dark throughout is an intruder (Shuttleworth et al. 2024, "
            "figure 1)."
        )


EXAMPLE = CosineMap()


def _rows(results: Any, layer: str | None) -> Frame:
    """The rows of one layer that all runs have, `run_id` and `layer` as plain text."""
    from lorabench.report.results import shared

    rows = rows_of(results, "cosines")
    if rows.empty:
        return rows
    rows = rows.astype({"run_id": str, "layer": str, "cosine": float})
    if layer is not None:
        return rows[rows["layer"] == layer]
    rows = shared(rows)
    nearest = rows.groupby(["layer", "run_id", "j"])["cosine"].max().groupby("layer").mean()
    return rows[rows["layer"] == nearest.idxmin()]


def _table(rows: Frame) -> Frame:
    """Directions of W0, top down, and below them the nearest other one, by those of W0 + ΔW."""
    table = rows.pivot(index="i", columns="j", values="cosine")
    return table.loc[[*(i for i in table.index if i), 0]]
