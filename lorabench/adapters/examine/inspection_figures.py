"""Figures of one adapter: spectra by kind of layer, layer × module heat maps, depth profiles. Imports matplotlib."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lorabench.adapters.examine.inspection import Row, by_kind, largest_kinds
from lorabench.linalg.nulls import null_spectra
from lorabench.report import drawing
from lorabench.report.figures._heat import cell_room, draw_bar, draw_table, fitting, spanning
from lorabench.report.figures.spectra import FLOOR

MAX_PANELS = 9
MAX_LINES = len(drawing.COLORS)
COLOR_MAP = "viridis"
LABELS = {
    "rank_90": "rank_90",
    "effective_rank_entropy": "Effective rank",
    "frobenius_norm": "‖ΔW‖",
    "relative_norm": "‖ΔW‖ / ‖W0‖",
}


def spectra(rows: list[Row]) -> Figure | None:
    """σᵢ / σ₁ of every layer, a panel a kind, coloured by depth; dashed the mean of random updates."""
    groups = largest_kinds([row for row in rows if row["singular_values"][0] > 0], MAX_PANELS)
    if not groups:
        return None
    depths = [row["depth"] for group in groups.values() for row in group if row["depth"] is not None]
    scale = ScalarMappable(Normalize(min(depths, default=0), max([*depths, 1])), COLOR_MAP)
    columns = drawing.panel_columns(len(groups))
    with drawing.style():
        figure, grid = drawing.new_figure(
            -(-len(groups) // columns), columns, sharex=True, sharey=True, height=1.9 if len(groups) > 1 else 2.3
        )
        for axes, (kind, group) in zip(grid.flat, groups.items(), strict=False):
            _spectrum_panel(axes, group, scale)
            axes.set_title(kind)
        for axes in drawing.lowest(grid, len(groups)):
            axes.set_xlabel("Index i")
        for axes in grid[:, 0]:
            axes.set_ylabel("σᵢ / σ₁")
        longest = max(len(row["singular_values"]) for group in groups.values() for row in group)
        drawing.powers_of_two(grid[0, 0], [2**k for k in range(longest.bit_length())])
        grid[0, 0].set_yscale("log")
        grid[0, 0].set_ylim(min(0.1, max(1e-4, grid[0, 0].get_ylim()[0])), 1.4)
        drawing.plain_logarithmic(grid[0, 0].yaxis)
        drawing.legend_below(figure, drawing.null_handle("random update of the same shape"))
        if len({*depths}) > 1:
            bar = figure.colorbar(scale, ax=grid, label="block", aspect=30, pad=0.01)
            bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def _spectrum_panel(axes: Axes, rows: list[Row], scale: ScalarMappable) -> None:
    for row in rows:
        S = np.array(row["singular_values"])
        ratios = S[FLOOR * S[0] < S] / S[0]
        color = scale.to_rgba(row["depth"]) if row["depth"] is not None else drawing.REFERENCE
        axes.plot(np.arange(1, len(ratios) + 1), ratios, color=color, linewidth=0.8, alpha=0.85)
    for M, N, rank in sorted({(*row["shape"], row["rank"]) for row in rows}, key=str)[:3]:
        null = null_spectra(M, N, rank).mean(0)
        null = null[null > FLOOR * null[0]] / null[0]
        axes.plot(
            np.arange(1, len(null) + 1), null, color=drawing.REFERENCE, linestyle=drawing.NULL_DASHES, linewidth=1.2
        )


def heat_maps(rows: list[Row]) -> Figure | None:
    """Kind of layer × block: rank_90 and ‖ΔW‖, the mean where a block has several of a kind."""
    rows, depths = _in_blocks(rows)
    if len(depths) < 2:
        return None
    groups = by_kind(rows)
    with drawing.style("white"):
        height = 0.9 + 0.19 * len(groups)
        grid = drawing.facets(("rank_90", "frobenius_norm"), height=height)
        for metric, axes in grid.axes_dict.items():
            means = _means(groups, [[row[metric] for row in group] for group in groups.values()], depths)
            table = pd.DataFrame(np.ma.filled(means, np.nan), list(groups), depths)
            colors = spanning([table.to_numpy()])
            (texts,) = fitting([table], cell_room(grid, height))
            draw_table(axes, table, colors, texts)
            axes.set_title("")
            draw_bar([axes], colors, LABELS[metric], pad=0.02)
        grid.set_xlabels("Block")
    return grid.figure


def _in_blocks(rows: list[Row]) -> tuple[list[Row], list[int]]:
    """The layers that changed and belong to a block, and these blocks."""
    rows = [row for row in rows if row["depth"] is not None and row["frobenius_norm"]]
    return rows, sorted({row["depth"] for row in rows})


def _means(groups: dict[str, list[Row]], values: list[list[float | None]], depths: list[int]) -> np.ndarray:
    """(kinds, depths): the mean of the values at each, masked where there is none."""
    table = np.full((len(groups), len(depths)), np.nan)
    for line, rows, known in zip(table, groups.values(), values, strict=True):
        for column, depth in enumerate(depths):
            here = [
                value for row, value in zip(rows, known, strict=True) if row["depth"] == depth and value is not None
            ]
            line[column] = np.mean(here) if here else np.nan
    return np.ma.masked_invalid(table)


def profiles(rows: list[Row]) -> Figure | None:
    """Effective rank, stable rank and the norm of ΔW over the blocks, a line a kind."""
    rows, depths = _in_blocks(rows)
    if len(depths) < 2:
        return None
    groups = largest_kinds(rows, MAX_LINES)
    norm = "relative_norm" if all(row.get("relative_norm") for row in rows) else "frobenius_norm"
    looks = drawing.looks(groups)
    with drawing.style():
        figure, grid = drawing.new_figure(1, 3, height=2.2)
        for axes, metric in zip(grid[0], ("rank_90", "effective_rank_entropy", norm), strict=True):
            means = _means(groups, [[row[metric] for row in group] for group in groups.values()], depths)
            nulls = _means(groups, [[row["null"].get(metric) for row in group] for group in groups.values()], depths)
            for kind, line, null in zip(groups, means, nulls, strict=True):
                look = looks[kind]
                axes.plot(depths, line, color=look.color, marker=look.marker, markersize=3, label=kind)
                axes.plot(depths, null, color=look.color, linestyle=drawing.NULL_DASHES, linewidth=0.7)
            axes.set_xlabel("Block")
            axes.set_ylabel(LABELS[metric])
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        grid[0, 0].yaxis.set_major_locator(MaxNLocator(5, integer=True))
        handles, labels = grid[0, 0].get_legend_handles_labels()
        drawing.legend_below(figure, dict(zip(labels, handles, strict=True)))
    return figure
