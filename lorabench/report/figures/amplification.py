"""Amplification: how much ΔW strengthens what W0 already does in ΔW's own directions, beside random ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.spec.figure import Figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

    from lorabench.report.drawing import Look

MAX_LINES = 7


@dataclass(frozen=True, kw_only=True)
class Amplification(Figure):
    """Left against the number of directions, right by kind of module with all of them; a colour a setting."""

    section: ClassVar[str] = "base"

    kinds: tuple[str, ...] = ()
    """Kinds of layers, such as `q_proj` (empty: all)."""

    def draw(self, results: Any) -> MatplotlibFigure | None:
        from lorabench.report import drawing
        from lorabench.report.figures._curves import null_handle
        from lorabench.report.results import selected, shared
        from lorabench.report.update_metrics import by_setting, ordered_kinds, per_run, shown_settings

        done = selected(results).done
        whole, growing = (self._rows(results, metric, done) for metric in ("amplification", "amplification_at"))
        if whole.empty:
            return None
        by_kind = _logarithms(per_run(results, whole, ["kind"], "geometric"))
        by_count = _logarithms(per_run(results, _of_all_layers(shared(growing)), ["r"], "geometric"))
        settings = shown_settings(results, by_kind, MAX_LINES)
        lines = by_setting(results, by_count, settings)
        groups = by_setting(results, by_kind, settings)
        looks = drawing.looks(label for label, _ in groups)
        with drawing.style():
            figure, grid = drawing.new_figure(1, 2, height=2.5)
            handles = _against_count(grid[0, 0], lines, looks)
            kinds = ordered_kinds(by_kind["kind"])
            _by_kind(grid[0, 1], groups, kinds, looks)
            for axes in grid[0]:
                axes.set(yscale="log", ylabel="Amplification ‖ΔW‖ / ‖Uᵀ W0 V‖")
                drawing.plain_logarithmic(axes.yaxis)
            grid[0, 0].set(
                xlabel="Top directions r of ΔW that U and V hold", title=", ".join(self.kinds) or "mean over all layers"
            )
            grid[0, 1].set(title="all directions of ΔW (at most 64)")
            handles |= null_handle("random U, V")
            drawing.legend_below(figure, list(handles.values()), list(handles))
        return figure

    def _rows(self, results: Any, metric: str, runs: pd.DataFrame) -> pd.DataFrame:
        from lorabench.report.update_metrics import metric_rows

        rows = metric_rows(results, f"alignment.{metric}", runs)
        return rows[rows["kind"].isin(self.kinds)] if self.kinds and len(rows) else rows

    def caption(self) -> str:
        from lorabench.report.update_metrics import THINNED

        of = f" ({', '.join(self.kinds)})" if self.kinds else ""
        return (
            "Amplification factor of ΔW, ‖ΔW‖ over ‖Uᵀ W0 V‖ with U and V the top singular directions of ΔW (Hu et al. "
            f"2021, section 7.3 and table 7): geometric means over layers{of} and seeds, 95% Student-t intervals of "
            "the logarithm over seeds (hollow: a single seed), settings at their own best learning rate. Dashed, or a "
            "dash: random U and V. Below it, ΔW goes where W0 is stronger than by chance; above it, where W0 does "
            "less. The factor falls with r, so settings compare at one r. " + THINNED
        )


EXAMPLE = Amplification()


def _of_all_layers(rows: pd.DataFrame) -> pd.DataFrame:
    """Each run up to the r that all its layers have: past it the mean would be over the larger ones alone."""
    at_r = rows.groupby(["run_id", "r"])["layer"].transform("nunique")
    return rows[at_r == rows.groupby("run_id")["layer"].transform("nunique")]


def _logarithms(rows: pd.DataFrame) -> pd.DataFrame:
    """Intervals of a ratio are those of its logarithm."""
    import numpy as np

    from lorabench.report.update_metrics import NULL, VALUE

    return rows.assign(**{name: np.log(rows[name]) for name in (VALUE, NULL)})


def _against_count(axes: Axes, lines: list[tuple[str, pd.DataFrame]], looks: dict[str, Look]) -> dict[str, Any]:
    """A line a setting over the number of directions; label -> handle."""
    from lorabench.report import drawing
    from lorabench.report.figures._curves import curve, draw_curve

    curves = {label: curve(rows, "r") for label, rows in lines}
    handles = {label: draw_curve(axes, line, looks[label], logs=True) for label, line in curves.items()}
    drawing.powers_of_two(axes, [x for line in curves.values() for x, _ in line])
    return handles


def _by_kind(axes: Axes, groups: list[tuple[str, pd.DataFrame]], kinds: list[str], looks: dict[str, Look]) -> None:
    """Points beside one another above each kind, each with its interval and a dash for its null."""
    import math

    from lorabench.report.aggregate import cell
    from lorabench.report.figures._curves import draw_null

    step = 0.8 / len(groups)
    for position, (label, rows) in enumerate(groups):
        look = looks[label]
        for place, kind in enumerate(kinds):
            item = cell(rows[rows["kind"] == kind], "value")
            if item.mean is None:
                continue
            x, half = place + step * (position - (len(groups) - 1) / 2), item.half or 0.0
            ends = math.exp(item.center - half), math.exp(item.center + half)
            face = "white" if item.half is None else look.color
            axes.vlines(x, *ends, color=look.color, linewidth=0.8)
            axes.plot(x, math.exp(item.center), look.marker, color=look.color, markersize=3.2, markerfacecolor=face)
            if item.null is not None:
                draw_null(axes, [(x, math.exp(item.null))], look.color)
    axes.set_xticks(range(len(kinds)), kinds, rotation=25, ha="right", rotation_mode="anchor")
    axes.grid(axis="x", visible=False)
