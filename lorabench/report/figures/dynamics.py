"""ΔW over the steps of training: its rank, its size, and how near its subspace is to the final one, beside chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.spec.figure import Figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

PANELS = {
    "effective_rank_entropy": "Effective rank (entropy)",
    "rank_90": "Rank of 90% of the energy",
    "relative_norm": "‖ΔW‖ / ‖W0‖",
    "phi_final_input": "φ with the final, input",
    "phi_final_output": "φ with the final, output",
    "cosine_final": "Cosine with the final ΔW",
}
"""Metric of the analysis `dynamics` -> label of its axis."""


@dataclass(frozen=True, kw_only=True)
class Dynamics(Figure):
    """A panel a metric, a colour and marker a setting."""

    section: ClassVar[str] = "training"

    kinds: tuple[str, ...] = ()
    """Kinds of layers to average over, such as `q_proj` (empty: every layer that all these runs have)."""

    def draw(self, results: Any) -> MatplotlibFigure | None:
        from lorabench.report import drawing
        from lorabench.report.figures._curves import null_handle
        from lorabench.report.labels import series_label
        from lorabench.report.results import grouped

        values = _values(results, self.kinds)
        if values.empty:
            return None
        metrics = [metric for metric in PANELS if (values["metric"] == metric).any()]
        columns = drawing.panel_columns(len(metrics))
        looks = drawing.looks(setting for setting, _ in grouped(values, results.settings))
        with drawing.style():
            figure, grid = drawing.new_figure(-(-len(metrics) // columns), columns, sharex=True)
            handles: dict[str, Any] = {}
            for axes, metric in zip(grid.flat, metrics, strict=False):
                chunk = values[values["metric"] == metric]
                for setting, series in grouped(chunk, results.settings):
                    handles[series_label(results.settings, setting)] = _curve(axes, series, looks[setting])
                axes.set_ylabel(PANELS[metric])
                _scale(axes, metric, chunk)
            for axes in drawing.lowest(grid, len(metrics)):
                axes.set_xlabel("Step")
            handles |= null_handle("random")
            drawing.legend_below(figure, list(handles.values()), list(handles))
        return figure

    def caption(self) -> str:
        of = f" ({', '.join(self.kinds)})" if self.kinds else ""
        return (
            f"ΔW after each snapshot: mean over layers{of} and seeds, bands 95% Student-t intervals over seeds; "
            "φ(k, k) with the final ΔW at the k directions that hold 90% of its energy. Dashed: random updates of the "
            "same shapes and ranks, and the similarity of random subspaces."
        )


EXAMPLE = Dynamics()


def _values(results: Any, kinds: tuple[str, ...]) -> pd.DataFrame:
    """One row a selected run, metric and step: the mean `value` and `value:null` over the layers that all runs have."""
    import pandas as pd

    from lorabench.report.results import selected, shared

    frame = results.analyses.get("dynamics", pd.DataFrame())
    if frame.empty:
        return frame
    runs = selected(results).done
    frame = frame[frame["run_id"].isin(runs.index) & frame["metric"].isin(list(PANELS)) & frame["step"].notna()]
    if kinds:
        frame = frame[frame["kind"].isin(kinds)]
    frame = shared(frame).astype({"run_id": str, "metric": str, "value": float, "null": float})
    means = frame.groupby(["run_id", "metric", "step"], sort=False)[["value", "null"]].mean().reset_index()
    means = means.rename(columns={"null": "value:null"}).dropna(subset=["value"])
    order = {run_id: position for position, run_id in enumerate(runs.index)}
    means = means.sort_values("run_id", key=lambda ids: ids.map(order), kind="stable")
    return means.join(runs[list(dict.fromkeys([*results.settings, "seed", "status"]))], on="run_id")


def _curve(axes: Axes, series: pd.DataFrame, look: Any) -> Any:
    """One setting over the steps: mean, band, and the random update's mean; the handle of the first."""
    from lorabench.report.aggregate import cell
    from lorabench.report.figures._curves import draw_null

    steps = sorted(series["step"].unique())
    cells = [cell(series[series["step"] == step], "value") for step in steps]
    (line,) = axes.plot(
        steps, [item.center for item in cells], color=look.color, marker=look.marker, linestyle=look.dashes,
        markersize=3.2, zorder=3,
    )  # fmt: skip
    bands = [(step, item.low, item.high) for step, item in zip(steps, cells, strict=True) if item.half is not None]
    if bands:
        at, low, high = zip(*bands, strict=True)
        axes.fill_between(at, low, high, color=look.color, alpha=0.15, linewidth=0)
    nulls = [(step, item.null) for step, item in zip(steps, cells, strict=True) if item.null is not None]
    draw_null(axes, nulls, look.color)
    return line


def _scale(axes: Axes, metric: str, values: pd.DataFrame) -> None:
    """Similarities on their whole range; ranks that are far apart on a log axis."""
    from lorabench.report.drawing import LOG_FACTOR, plain_logarithmic

    if metric.startswith("phi_"):
        axes.set_ylim(0, 1.04)
    elif metric in ("effective_rank_entropy", "rank_90"):
        known = values[["value", "value:null"]].stack()
        if known.max() > LOG_FACTOR * known.min() > 0:
            axes.set_yscale("log")
            plain_logarithmic(axes.yaxis)
