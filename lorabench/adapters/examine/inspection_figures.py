"""Figures of one adapter: spectra by kind of layer, layer × module heat maps, depth profiles. Imports seaborn."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lorabench.adapters.examine.inspection import Row, largest_kinds
from lorabench.linalg.nulls import null_spectra
from lorabench.report import drawing
from lorabench.report.figures._curves import draw_curve, draw_null
from lorabench.report.figures._heat import MAP, draw_tables, spanning
from lorabench.report.figures.spectra import FLOOR

MAX_PANELS = 9
MAX_LINES = len(drawing.COLORS)
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
    shown = [row for group in groups.values() for row in group]
    depths = [row["depth"] for row in shown if row["depth"] is not None]
    scale = ScalarMappable(Normalize(min(depths, default=0), max([*depths, 1])), MAP)
    with drawing.facets(groups, height=1.9 if len(groups) > 1 else 2.3) as grid:
        grid.set(yscale="log")
        for kind, axes in grid.axes_dict.items():
            _spectrum_panel(axes, groups[kind], scale)
        drawing.powers_of_two(axes, range(1, 1 + max(len(row["singular_values"]) for row in shown)))
        axes.set_ylim(min(0.1, max(1e-4, axes.get_ylim()[0])), 1.4)
        drawing.plain_logarithmic(axes.yaxis)
        grid.set_axis_labels("Index i", "σᵢ / σ₁")
        drawing.legend_below(grid.figure, {}, "random update of the same shape")
        if len({*depths}) > 1:
            bar = grid.figure.colorbar(scale, ax=grid.axes, label="block", aspect=30, pad=0.01)
            drawing.whole_numbers(bar.ax.yaxis)
    return grid.figure


def _spectrum_panel(axes: Axes, rows: list[Row], scale: ScalarMappable) -> None:
    colors = {row["layer"]: drawing.REFERENCE if row["depth"] is None else scale.to_rgba(row["depth"]) for row in rows}
    curves = pd.concat(_ratios(np.array(row["singular_values"]), row["layer"]) for row in rows)
    sns.lineplot(
        curves, x="index", y="ratio", hue="layer", palette=colors, estimator=None, ax=axes, legend=False,
        linewidth=0.8, alpha=0.85,
    )  # fmt: skip
    for M, N, rank in sorted({(*row["shape"], row["rank"]) for row in rows}, key=str)[:3]:
        null = _ratios(null_spectra(M, N, rank).mean(0), "random")
        draw_null(axes, null, "index", "ratio", drawing.REFERENCE)


def _ratios(S: np.ndarray, layer: str) -> pd.DataFrame:
    ratios = S[FLOOR * S[0] < S] / S[0]
    return pd.DataFrame({"layer": layer, "index": np.arange(1, len(ratios) + 1), "ratio": ratios})


def heat_maps(rows: list[Row]) -> Figure | None:
    """Kind of layer × block: rank_90 and ‖ΔW‖, the mean where a block has several of a kind."""
    changed = _in_blocks(rows)
    if changed["depth"].nunique() < 2:
        return None
    metrics = ("rank_90", "frobenius_norm")
    with drawing.facets(metrics, height=0.9 + 0.19 * changed["kind"].nunique(), theme="white") as grid:
        for metric, axes in grid.axes_dict.items():
            means = changed.pivot_table(index="kind", columns="depth", values=metric).reindex(changed["kind"].unique())
            draw_tables([axes], [means], spanning([means]), LABELS[metric], pad=0.02)
            axes.set_title("")
        grid.set_xlabels("Block")
    return grid.figure


def _in_blocks(rows: list[Row]) -> pd.DataFrame:
    """The layers that changed and belong to a block."""
    changed = [row for row in rows if row["depth"] is not None and row["frobenius_norm"]]
    frame = pd.DataFrame(changed, columns=["kind", "depth", "null", *LABELS])
    return frame.astype(dict.fromkeys(LABELS, float))


def profiles(rows: list[Row]) -> Figure | None:
    """Effective rank, rank of 90% and the norm of ΔW over the blocks, a line a kind."""
    changed = _in_blocks(rows)
    if changed["depth"].nunique() < 2:
        return None
    looks = drawing.looks(largest_kinds([row for row in rows if row["depth"] is not None], MAX_LINES))
    norm = "relative_norm" if changed["relative_norm"].gt(0).all() else "frobenius_norm"
    with drawing.facets(["rank_90", "effective_rank_entropy", norm], height=2.2, sharey=False) as grid:
        for metric, axes in grid.axes_dict.items():
            lines = changed.assign(chance=[null.get(metric) for null in changed["null"]])
            for kind, look in looks.items():
                draw_curve(axes, lines[lines["kind"] == kind], look, "depth", metric, "chance")
            axes.set(title="", ylabel=LABELS[metric], ylim=(0, None))
            drawing.whole_numbers(axes.xaxis, 6)
        drawing.whole_numbers(grid.axes.flat[0].yaxis)
        grid.set_xlabels("Block")
        drawing.legend_below(grid.figure, looks)
    return grid.figure
