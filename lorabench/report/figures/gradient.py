"""Whether ΔW turns to the loss's gradient at W0 over the steps of training: of the task, and of what is retained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.report.update_metrics import per_run, rows_of
from lorabench.spec.figure import Canvas, Figure

PANELS = {
    ("phi_task_at", "input"): "gradient of the task, input side",
    ("phi_task_at", "output"): "gradient of the task, output side",
    ("phi_retain_at", "input"): "gradient of what is retained, input side",
    ("phi_retain_at", "output"): "gradient of what is retained, output side",
}
"""Metric and side of the analysis `gradient` -> title of its panel."""


@dataclass(frozen=True, kw_only=True)
class GradientCurves(Figure):
    """A panel a gradient and side, a look a setting."""

    section: ClassVar[str] = "training"
    most: ClassVar[int] = 8

    kinds: tuple[str, ...] = ()
    """Kinds of layers to average over, such as `q_proj` (empty: every layer that all these runs have)."""

    def draw(self, results: Any) -> Canvas | None:
        from lorabench.report import drawing
        from lorabench.report.figures._curves import draw_lines, settings
        from lorabench.report.results import shared

        rows = rows_of(results, "gradient", kinds=self.kinds)
        if rows.empty:
            return None
        rows = shared(rows[rows["step"].notna() & rows["value"].notna()])
        rows = rows.astype({"run_id": str, "metric": str, "side": str, "value": float, "null": float})
        found, looks = settings(results, per_run(results, rows, ["metric", "side", "step"]), self.most)
        parts = {place: found[(found["metric"] == place[0]) & (found["side"] == place[1])] for place in PANELS}
        panels = {PANELS[place]: part for place, part in parts.items() if len(part)}
        with drawing.facets(panels, self.width, columns=2) as grid:
            for label, axes in grid.axes_dict.items():
                draw_lines(axes, panels[label], looks, "step", within=(0, 1))
            axes.set_ylim(bottom=0)
            grid.set_axis_labels("Step", "φ(k, k) of ΔW with it")
            drawing.legend_below(grid.figure, looks, "random")
        return grid.figure

    def caption(self) -> str:
        return (
            "Similarity φ(k, k) of the top k directions of ΔW after each snapshot with those of the loss's gradient at "
            f"W0 (k: the final ΔW's rank, at most 16): mean over layers{self.of_kinds} and seeds. LoRA under gradient "
            "descent turns to the task's (Zhang et al. 2025). Dashed: random subspaces."
        )


EXAMPLE = GradientCurves()
