"""Figures of two adapters: grids of subspace similarity and principal angles, beside chance. Imports seaborn."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lorabench.adapters.examine.comparison import Row, mean_grid
from lorabench.adapters.examine.comparison_text import SIDES
from lorabench.adapters.examine.inspection import by_kind
from lorabench.report import drawing
from lorabench.report.figures._curves import draw_curve
from lorabench.report.figures._heat import draw_similarities
from lorabench.report.figures.subspace_grid import FIRST_KINDS

MAX_KINDS = 3
MAX_LINES = len(drawing.COLORS)


def phi_grids(rows: list[Row]) -> Figure:
    """φ(i, j): a row a side, a panel a kind of layer (query and value first), and chance at the right."""
    found = list(by_kind(rows))
    kinds = sorted(found, key=lambda kind: (kind not in FIRST_KINDS, found.index(kind)))[:MAX_KINDS]
    tables: dict[str, pd.DataFrame] = {}
    for side in SIDES:
        here = [row for row in rows if row["side"] == side and row["kind"] in kinds]
        groups = by_kind(here)
        tables |= {f"{kind}, {side}": _table(groups.get(kind, []), "phi") for kind in kinds}
        tables[f"chance, {side}"] = _table(here, "chance")
    labels = ("i (directions of A)", "j (directions of B)")
    return draw_similarities(tables, len(kinds) + 1, labels, "φ(i, j)", "page")


def _table(rows: list[Row], key: str) -> pd.DataFrame:
    """With i and j from 1; empty where a side has no such layer."""
    if not rows:
        return pd.DataFrame(dtype=float)
    grid = mean_grid(rows, key)
    return pd.DataFrame(grid, range(1, grid.shape[0] + 1), range(1, grid.shape[1] + 1))


def angles(rows: list[Row]) -> Figure:
    """Mean principal angles by kind of layer, a panel a side; dashed what random subspaces give."""
    kinds = list(by_kind(rows))[:MAX_LINES]
    looks = drawing.looks(kinds)
    with drawing.facets([f"{side} side" for side in SIDES], height=2.2) as grid:
        for axes, side in zip(grid.axes.flat, SIDES, strict=True):
            for kind, group in by_kind([row for row in rows if row["side"] == side and row["kind"] in kinds]).items():
                draw_curve(axes, _angles(group), looks[kind], "index", "radians", "chance")
            axes.set_yticks([0, np.pi / 8, np.pi / 4, 3 * np.pi / 8, np.pi / 2], ["0", "π/8", "π/4", "3π/8", "π/2"])
            drawing.whole_numbers(axes.xaxis, 8)
        grid.set(ylim=(0, 1.05 * np.pi / 2)).set_axis_labels("Index, the smallest angle first", "Principal angle")
        drawing.legend_below(grid.figure, looks, "chance")
    return grid.figure


def _angles(rows: list[Row]) -> pd.DataFrame:
    """Of all layers, up to the number of angles that all have."""
    size = min(len(row["principal_angles_radians"]) for row in rows)
    values = {key: np.ravel([row[f"principal_angles_{key}"][:size] for row in rows]) for key in ("radians", "chance")}
    return pd.DataFrame({"index": np.tile(np.arange(1, size + 1), len(rows)), **values})
