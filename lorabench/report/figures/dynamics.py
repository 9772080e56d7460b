"""ΔW over the steps of training: its rank, its size, and how near its subspace is to the final one, beside chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.report.update_metrics import per_run, rows_of
from lorabench.spec.figure import Canvas, Figure

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
    """A panel a metric, a look a setting."""

    section: ClassVar[str] = "training"
    needs: ClassVar[str] = "runs with a ΔW that kept snapshots (`snapshot_every`)"

    kinds: tuple[str, ...] = ()
    """Kinds of layers to average over, such as `q_proj` (empty: every layer that all these runs have)."""

    def draw(self, results: Any) -> Canvas | None:
        from lorabench.report import drawing
        from lorabench.report.figures._curves import draw_lines, settings
        from lorabench.report.results import shared

        rows = rows_of(results, "dynamics", kinds=self.kinds)
        if rows.empty:
            return None
        rows = shared(rows[rows["metric"].isin(list(PANELS)) & rows["step"].notna() & rows["value"].notna()])
        rows = rows.astype({"run_id": str, "metric": str, "value": float, "null": float})
        found, looks = settings(results, per_run(results, rows, ["metric", "step"]))
        metrics = [metric for metric in PANELS if (found["metric"] == metric).any()]
        with drawing.facets(metrics, self.width, sharey=False) as grid:
            for metric, axes in grid.axes_dict.items():
                within = (0, 1) if "phi" in metric else (-1, 1) if "cosine" in metric else (0, float("inf"))
                draw_lines(axes, found[found["metric"] == metric], looks, "step", within=within)
                axes.set(title="", ylabel=PANELS[metric])
                if "phi" in metric:
                    axes.set_ylim(0, 1.04)
                elif "rank" in metric:
                    drawing.limit([axes])
            grid.set_xlabels("Step")
            drawing.legend_below(grid.figure, looks, "random")
        return grid.figure

    def caption(self) -> str:
        return (
            f"ΔW after each snapshot: mean over layers{self.of_kinds} and seeds; φ(k, k) with the final ΔW at the k "
            "directions that hold 90% of its energy. Dashed: random updates of the same shapes and ranks, and the "
            "similarity of random subspaces."
        )


EXAMPLE = Dynamics()
