"""Figures of many adapters: the energy that few directions hold, and what adapters left out share. Imports seaborn."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lorabench.adapters.examine.ensemble import SIDES, Row
from lorabench.adapters.examine.inspection import by_kind
from lorabench.report import drawing
from lorabench.report.figures._curves import draw_curve
from lorabench.report.figures.subspace_grid import FIRST_KINDS

MAX_KINDS = 4
"""The lines of more, and of what chance gives them, could not be told apart; the tables have all."""
TESTS = {
    "left_out": "the others",
    "mean_directions": "their mean",
    "beyond_mean": "the others,\nbeyond the mean",
}


def explained_energy(rows: list[Row]) -> Figure:
    """Mean share of the energy in the best k directions by kind of layer, a panel a side; dashed chance."""
    kinds = _shown(rows)
    looks = drawing.looks(kinds)
    with drawing.facets([f"{side} side" for side in SIDES], height=2.2) as grid:
        for axes, side in zip(grid.axes.flat, SIDES, strict=True):
            for kind, group in by_kind([row for row in rows if row["side"] == side and row["kind"] in kinds]).items():
                draw_curve(axes, _curve(group), looks[kind], "k", "explained", "explained_chance")
            drawing.whole_numbers(axes.xaxis, 8)
        grid.set(ylim=(0, 1.05)).set_axis_labels("Directions k", "Share of Σ ‖ΔW‖²")
        drawing.legend_below(grid.figure, looks, "chance")
    return grid.figure


def _shown(rows: list[Row]) -> list[str]:
    """Query and value first."""
    found = list(by_kind(rows))
    return sorted(found, key=lambda kind: (kind not in FIRST_KINDS, found.index(kind)))[:MAX_KINDS]


def _curve(rows: list[Row]) -> pd.DataFrame:
    """Of all layers, up to the number of directions that all have."""
    size = min(len(row["explained"]) for row in rows)
    values = {key: np.ravel([row[key][:size] for row in rows]) for key in ("explained", "explained_chance")}
    return pd.DataFrame({"k": np.tile(np.arange(1, size + 1), len(rows)), **values})


def left_out_energy(rows: list[Row]) -> Figure:
    """Mean share of a left-out adapter's energy in k directions of the others by kind of layer; a dash is chance."""
    kinds = _shown(rows)
    looks = drawing.looks(kinds)
    with drawing.facets([f"{side} side" for side in SIDES], height=2.2) as grid:
        for axes, side in zip(grid.axes.flat, SIDES, strict=True):
            groups = by_kind([row for row in rows if row["side"] == side and row["kind"] in kinds])
            for place, (kind, group) in enumerate(groups.items()):
                look, shift = looks[kind], 0.6 * ((place + 0.5) / len(groups) - 0.5)
                spots = pd.DataFrame([(at + shift, value) for at, value in _tests(group)], columns=["x", "y"])
                how = {"x": "x", "ax": axes, "legend": False, "color": look.color}
                chance, ends = float(np.mean([row["chance"] for row in group])), (spots["x"] - 0.07, spots["x"] + 0.07)
                axes.hlines([chance] * len(spots), *ends, look.color, drawing.NULL_DASHES, linewidth=0.9)
                sns.scatterplot(spots, y="y", marker=look.marker, s=22, zorder=3, **how)
            axes.set_xticks(range(len(TESTS)), list(TESTS.values()))
            axes.grid(axis="x", visible=False)
        grid.set(ylim=(-0.02, 1.05), xlim=(-0.5, len(TESTS) - 0.5))
        grid.set_axis_labels("k directions of", "Share of ‖ΔW‖²")
        drawing.legend_below(grid.figure, looks, "chance")
    return grid.figure


def _tests(rows: list[Row]) -> list[tuple[int, float]]:
    """The place of each test and its mean over the layers that have it."""
    values = {key: [row[key] for row in rows if row[key] is not None] for key in TESTS}
    return [(place, float(np.mean(known))) for place, known in enumerate(values.values()) if known]
