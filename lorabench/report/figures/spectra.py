"""Singular values of ΔW, normalized by the largest, beside those of a random update of the same shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.spec.figure import Figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

RANK = "method.rank"
FLOOR = 1e-6
"""Ratios below it are rounding of float32, and are not drawn."""


@dataclass(frozen=True, kw_only=True)
class Spectra(Figure):
    """A panel a method and setting, a colour a rank; methods without a rank stand in black in every panel."""

    section: ClassVar[str] = "spectra"

    kinds: tuple[str, ...] = ()
    """Kinds of layers to average over, such as `q_proj` (empty: every layer that all these runs have)."""

    def draw(self, results: Any) -> MatplotlibFigure | None:
        from lorabench.report import drawing
        from lorabench.report.figures._curves import null_handle
        from lorabench.report.labels import series_label
        from lorabench.report.results import grouped, ordered

        values = _values(results, self.kinds)
        if values.empty:
            return None
        keys = [key for key in results.settings if key != RANK]
        ranked = values[values[RANK].notna()] if RANK in values else values.iloc[:0]
        level = values[values[RANK].isna()] if RANK in values else values
        ranks = ordered(ranked[RANK]) if len(ranked) else []
        panels = grouped(ranked, keys) if len(ranked) else [((), ranked)]
        columns = drawing.panel_columns(len(panels))
        with drawing.style():
            figure, grid = drawing.new_figure(-(-len(panels) // columns), columns, sharex=True, sharey=True, height=2.6)
            handles: dict[str, Any] = {}
            for axes, (place, chunk) in zip(grid.flat, panels, strict=False):
                handles |= _panel(axes, chunk, _same_base(level, keys, place), keys, ranks)
                axes.set_title(series_label(keys, place, full=True) if place else "")
            for axes in drawing.lowest(grid, len(panels)):
                axes.set_xlabel("Index i")
            for axes in grid[:, 0]:
                axes.set_ylabel("σᵢ / σ₁")
            drawing.powers_of_two(grid[0, 0], [2**k for k in range(int(values["index"].max()).bit_length())])
            grid[0, 0].set_yscale("log")
            grid[0, 0].set_ylim(max(1e-4, grid[0, 0].get_ylim()[0]), 1.4)
            drawing.plain_logarithmic(grid[0, 0].yaxis)
            if values["null_ratio"].notna().any():
                handles |= null_handle("Gaussian")
            drawing.legend_below(figure, list(handles.values()), list(handles))
        return figure

    def caption(self) -> str:
        of = f" ({', '.join(self.kinds)})" if self.kinds else ""
        return (
            f"Singular values of the update relative to the largest: geometric mean over layers{of} and seeds, band "
            "from the 10th to the 90th percentile, up to the length that all layers have. Dashed: "
            "random Gaussian updates of the same shapes and ranks, "
            "beside which a decay is to be read."
        )


EXAMPLE = Spectra()


def _values(results: Any, kinds: tuple[str, ...]) -> pd.DataFrame:
    """The singular values of the selected runs in the layers that all of them have, with ratios to the first."""
    import pandas as pd

    from lorabench.report.results import selected, shared

    frame = results.analyses.get("singular_values", pd.DataFrame())
    if frame.empty:
        return frame
    runs = selected(results).done
    frame = frame[frame["run_id"].isin(runs.index)]
    if kinds:
        frame = frame[frame["kind"].isin(kinds)]
    frame = shared(frame).astype({"index": int, "value": float, "null": float})
    first = frame.groupby(["run_id", "layer"], observed=True)[["value", "null"]].transform("max")
    frame["ratio"] = frame["value"] / first["value"]
    frame["null_ratio"] = frame["null"] / first["null"]
    return frame[frame["ratio"] > FLOOR].join(runs[results.settings], on="run_id")


def _same_base(level: pd.DataFrame, keys: list[str], place: tuple[Any, ...]) -> pd.DataFrame:
    """What has no rank, for a panel: the same in every key that it has, method and quantization apart."""
    from lorabench.report.results import kept_rows

    for key, value in zip(keys, place, strict=False):
        if key not in ("method.name", "quantization"):
            level = kept_rows(level, (item is None or item == value for item in level[key]))
    return level


def _panel(axes: Axes, ranked: pd.DataFrame, level: pd.DataFrame, keys: list[str], ranks: list[Any]) -> dict[str, Any]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    from lorabench.report import drawing
    from lorabench.report.labels import series_label
    from lorabench.report.results import grouped

    handles: dict[str, Any] = {}
    for i, rank in enumerate(ranks):
        if not (ranked[RANK] == rank).any():
            continue
        color = to_hex(colormaps["viridis"](0.88 * i / max(1, len(ranks) - 1)))
        look = drawing.Look(color, drawing.MARKERS[i % len(drawing.MARKERS)])
        handles[f"rank {rank}"] = _curve(axes, ranked[ranked[RANK] == rank], look)
    looks = drawing.looks(values for values, _ in grouped(level, keys))
    for values, chunk in grouped(level, keys):
        look = looks[values] if not ranks else drawing.Look("#000000", "X", looks[values].dashes)
        handles[series_label(keys, values)] = _curve(axes, chunk, look)
    return handles


def _common_length(values: pd.DataFrame) -> int:
    """Up to where every layer has singular values: past it the mean would be over the larger layers alone."""
    counts = values.groupby("index").size()
    return int(counts.index[counts == counts.max()].max())


def _curve(axes: Axes, values: pd.DataFrame, look: Any) -> Any:
    """One series: mean, band and its null; the handle of the mean."""
    import numpy as np

    from lorabench.report.figures._curves import draw_null

    values = values[values["index"] <= _common_length(values)]
    logs = np.log(values["ratio"].clip(lower=FLOOR))
    by_index = logs.groupby(values["index"])
    mean = np.exp(by_index.mean())
    marks = [int(np.searchsorted(mean.index, 2**k)) for k in range(12) if 2**k <= mean.index.max()]
    (line,) = axes.plot(
        mean.index, mean, color=look.color, marker=look.marker, markersize=3.2, markevery=marks, zorder=3
    )
    axes.fill_between(
        mean.index,
        np.exp(by_index.quantile(0.1)),
        np.exp(by_index.quantile(0.9)),
        color=look.color,
        alpha=0.15,
        linewidth=0,
    )
    null = values.dropna(subset=["null_ratio"])
    if len(null):
        null_mean = np.exp(np.log(null["null_ratio"].clip(lower=FLOOR)).groupby(null["index"]).mean())
        draw_null(axes, list(null_mean.items()), look.color)
    return line
