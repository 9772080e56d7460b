"""How far W0's top singular values and subspaces move, beside a random update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.report.update_metrics import common_layers, metric_rows, per_run
from lorabench.spec.figure import Canvas, Figure

PANELS = {
    "spectral_shift_at": "‖σ(W) − σ(W0)‖ / ‖σ(W0)‖",
    "angle_mean": "Mean angle (radians)",
    "rotation_gap_at": "Left against right turn",
}
"""Metric of the analysis `off_principal` -> label of its axis."""


@dataclass(frozen=True, kw_only=True)
class OffPrincipalCurves(Figure):
    """A panel a metric, a look a setting."""

    section: ClassVar[str] = "base"
    most: ClassVar[int] = 6

    kinds: tuple[str, ...] = ()
    """Kinds of layers to average over, such as `q_proj` (empty: every layer that all these runs have)."""

    def draw(self, results: Any) -> Canvas | None:
        from lorabench.report import drawing
        from lorabench.report.figures._curves import draw_lines, settings

        tables = {metric: metric_rows(results, f"off_principal.{metric}", kinds=self.kinds) for metric in PANELS}
        tables = {metric: common_layers(rows, "k") for metric, rows in tables.items() if not rows.empty}
        if not tables:
            return None
        with drawing.facets(tables, self.width, sharey=False) as grid:
            for metric, axes in grid.axes_dict.items():
                found, looks = settings(results, per_run(results, tables[metric], ["k"]), self.most)
                axes.set_yscale("log")
                draw_lines(axes, found, looks, "k", within=(0, float("inf")))
                axes.set(title="", ylabel=PANELS[metric])
                drawing.plain_logarithmic(axes.yaxis)
                drawing.powers_of_two(axes, found["k"])
            grid.set_xlabels("Top k directions")
            drawing.legend_below(grid.figure, looks, "random")
        return grid.figure

    def caption(self) -> str:
        return (
            "How far ΔW moves the k largest singular values of W0, how far it turns their subspace (mean of the k "
            "principal angles, of both sides), and how differently left and right turn (0: alike, 1: independently): "
            f"means over layers{self.of_kinds} that all runs have (where there is none: each run's own), "
            "geometric ones over seeds. Dashed: ΔW's singular values in random directions."
        )


EXAMPLE = OffPrincipalCurves()
