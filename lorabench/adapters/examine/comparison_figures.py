"""Figures of two adapters: grids of subspace similarity and principal angles, beside chance. Imports matplotlib."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lorabench.adapters.examine.comparison import Row, mean_grid
from lorabench.adapters.examine.comparison_text import SIDES
from lorabench.adapters.examine.inspection import by_kind
from lorabench.report import drawing
from lorabench.report.figures.subspace_grid import FIRST_KINDS

MAX_KINDS = 3
MAX_LINES = len(drawing.COLORS)


def phi_grids(rows: list[Row]) -> Figure:
    """φ(i, j): a row a side, a panel a kind of layer (query and value first), and chance at the right."""
    found = list(by_kind(rows))
    kinds = sorted(found, key=lambda kind: (kind not in FIRST_KINDS, found.index(kind)))[:MAX_KINDS]
    with drawing.style():
        drawing.plt.rcParams["axes.grid"] = False
        figure, grid = drawing.new_figure(2, len(kinds) + 1, height=1.75, sharex=True, sharey=True)
        for line, side in zip(grid, SIDES, strict=True):
            here = [row for row in rows if row["side"] == side and row["kind"] in kinds]
            for axes, (kind, group) in zip(line, sorted(by_kind(here).items(), key=lambda item: kinds.index(item[0])),
                                           strict=False):  # fmt: skip
                mesh = _heat(axes, mean_grid(group), f"{kind}, {side}")
            mesh = _heat(line[-1], mean_grid(here, "chance"), f"chance, {side}")
        for axes in grid[-1]:
            axes.set_xlabel("j (directions of B)")
        for axes in grid[:, 0]:
            axes.set_ylabel("i (directions of A)")
        figure.colorbar(mesh, ax=grid, label="φ(i, j)", aspect=36, pad=0.01)
    return figure


def _heat(axes: Axes, grid: np.ndarray, title: str) -> QuadMesh:
    edges = [np.arange(size + 1) + 0.5 for size in reversed(grid.shape)]
    mesh = axes.pcolormesh(*edges, grid, vmin=0, vmax=1, cmap="magma", rasterized=True)
    axes.set_ylim(edges[1][-1], edges[1][0])  # as a matrix is written
    axes.set_title(title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=2))
    return mesh


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
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        grid[0, 0].set_ylabel("Principal angle")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        dashes = Line2D([], [], color=drawing.REFERENCE, linestyle=drawing.NULL_DASHES, linewidth=0.8)
        drawing.legend_below(figure, [*handles, dashes], [*labels, "chance"])
    return figure


def _mean(rows: list[Row], key: str) -> np.ndarray:
    """Over the layers, up to the number of angles that all have."""
    size = min(len(row[key]) for row in rows)
    return np.mean([row[key][:size] for row in rows], axis=0)
