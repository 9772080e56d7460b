"""How far the top singular directions of W0 survive in W0 + ΔW, beside chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lorabench.report.update_metrics import common_layers, metric_rows, per_run
from lorabench.spec.figure import Canvas, Figure

TITLES = {"input": "input side (right)", "output": "output side (left)"}
LABELS = {"survival_at": ("Number of top directions k", "φ(k, k)"), "direction_cosine": ("Direction k", "|cos|")}


@dataclass(frozen=True, kw_only=True)
class SurvivalCurves(Figure):
    """A panel a side, a look a setting."""

    section: ClassVar[str] = "base"
    needs: ClassVar[str] = "runs with a ΔW, and the W0 that it was added to"
    most: ClassVar[int] = 8

    metric: Literal["survival_at", "direction_cosine"] = "survival_at"
    """φ(k, k) of the top k directions together, or |cos| of the k-th one with its successor."""
    kinds: tuple[str, ...] = ()
    """Kinds of layers to average over, such as `q_proj` (empty: every layer that all these runs have)."""

    def draw(self, results: Any) -> Canvas | None:
        from lorabench.report import drawing
        from lorabench.report.figures._curves import draw_lines, settings

        rows = metric_rows(results, f"survival.{self.metric}", kinds=self.kinds)
        if rows.empty:
            return None
        found, looks = settings(results, per_run(results, common_layers(rows, "k"), ["side", "k"]), self.most)
        sides = sorted(found["side"].unique())
        x, y = LABELS[self.metric]
        with drawing.facets(map(TITLES.__getitem__, sides), self.width) as grid:
            for side, axes in zip(sides, grid.axes.flat, strict=True):
                draw_lines(axes, found[found["side"] == side], looks, "k", within=(0, 1), null=drawing.REFERENCE)
            drawing.powers_of_two(axes, found["k"])
            grid.set(ylim=(0, 1.03)).set_axis_labels(x, f"{y}, W0 and W0 + ΔW")
            drawing.legend_below(grid.figure, looks, "chance")
        return grid.figure

    def caption(self) -> str:
        what = (
            "How much of the span of the k top singular directions of W0 lies in that of W0 + ΔW, φ(k, k)"
            if self.metric == "survival_at"
            else "|cos| between the k-th singular direction of W0 and the k-th of W0 + ΔW"
        )
        return (
            f"{what} (1: untouched): means over the layers{self.of_kinds} that all runs have (where there is none: "
            "each run's own) and over seeds. Dashed: random directions."
        )


EXAMPLE = SurvivalCurves()
