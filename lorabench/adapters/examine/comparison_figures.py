"""Figures of two adapters: grids of subspace similarity and principal angles, beside chance. Imports matplotlib."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lorabench.adapters.examine.comparison import Row, mean_grid
from lorabench.adapters.examine.comparison_text import SIDES
from lorabench.adapters.examine.inspection import by_kind
from lorabench.report import drawing
from lorabench.report.figures._heat import cell_room, draw_bar, draw_table, fitting, from_zero
from lorabench.report.figures.subspace_grid import FIRST_KINDS

MAX_KINDS = 3
MAX_LINES = len(drawing.COLORS)


def phi_grids(rows: list[Row]) -> Figure:
    """φ(i, j): a row a side, a panel a kind of layer (query and value first), and chance at the right."""
    found = list(by_kind(rows))
    kinds = sorted(found, key=lambda kind: (kind not in FIRST_KINDS, found.index(kind)))[:MAX_KINDS]
    panels: dict[str, np.ndarray | None] = {}
    for side in SIDES:
        here = [row for row in rows if row["side"] == side and row["kind"] in kinds]
        groups = by_kind(here)
        panels |= {f"{kind}, {side}": mean_grid(groups[kind]) if kind in groups else None for kind in kinds}
        panels[f"chance, {side}"] = mean_grid(here, "chance")
    shapes = [grid.shape for grid in panels.values() if grid is not None]
    marks = [range(1, max(shape[axis] for shape in shapes) + 1) for axis in (0, 1)]
    tables = {title: _table(grid).reindex(index=marks[0], columns=marks[1]) for title, grid in panels.items()}
    colors = from_zero(tables.values(), most=1.0)
    with drawing.style("white"):
        layout = drawing.facets(tables, "page", height=1.75, columns=len(kinds) + 1)
        texts = fitting(list(tables.values()), cell_room(layout, 1.75))
        for (title, axes), text in zip(layout.axes_dict.items(), texts, strict=True):
            draw_table(axes, tables[title], colors, text)
        layout.set_axis_labels("j (directions of B)", "i (directions of A)")
        draw_bar(layout.axes.flat, colors, "φ(i, j)", aspect=36)
    return layout.figure


def _table(grid: np.ndarray | None) -> pd.DataFrame:
    """With i and j from 1; empty where a side has no such layer."""
    if grid is None:
        return pd.DataFrame(dtype=float)
    return pd.DataFrame(grid, range(1, grid.shape[0] + 1), range(1, grid.shape[1] + 1))


def angles(rows: list[Row]) -> Figure:
    """Mean principal angles by kind of layer, a panel a side; dashed what random subspaces give."""
    kinds = list(by_kind(rows))[:MAX_LINES]
    looks = drawing.looks(kinds)
    with drawing.style():
        figure, grid = drawing.new_figure(1, 2, height=2.2, sharey=True)
        for axes, side in zip(grid[0], SIDES, strict=True):
            for kind, group in by_kind([row for row in rows if row["side"] == side and row["kind"] in kinds]).items():
                look = looks[kind]
                mean, chance = (_mean(group, f"principal_angles_{key}") for key in ("radians", "chance"))
                index = np.arange(1, len(mean) + 1)
                axes.plot(index, mean, color=look.color, marker=look.marker, markersize=3, label=kind)
                axes.plot(index, chance, color=look.color, linestyle=drawing.NULL_DASHES, linewidth=0.7)
            axes.set_title(f"{side} side")
            axes.set_xlabel("Index, the smallest angle first")
            axes.set_ylim(0, 1.05 * np.pi / 2)
            axes.set_yticks([0, np.pi / 8, np.pi / 4, 3 * np.pi / 8, np.pi / 2], ["0", "π/8", "π/4", "3π/8", "π/2"])
            drawing.whole_numbers(axes.xaxis, 8)
        grid[0, 0].set_ylabel("Principal angle")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        drawing.legend_below(figure, dict(zip(labels, handles, strict=True)) | drawing.null_handle("chance"))
    return figure


def _mean(rows: list[Row], key: str) -> np.ndarray:
    """Over the layers, up to the number of angles that all have."""
    size = min(len(row[key]) for row in rows)
    return np.mean([row[key][:size] for row in rows], axis=0)
