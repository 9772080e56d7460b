"""How far the top singular directions of W0 survive in W0 + ΔW, beside chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.figure import Figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

TITLES = {"input": "input side (right)", "output": "output side (left)"}


@dataclass(frozen=True, kw_only=True)
class SurvivalCurves(Figure):
    """A panel a side, a look a setting."""

    section: ClassVar[str] = "base"
    most: ClassVar[int] = 8

    metric: Literal["survival_at", "direction_cosine"] = "survival_at"
    """φ(k, k) of the top k directions together, or |cos| of the k-th one with its successor."""
    kinds: tuple[str, ...] = ()
    """Kinds of layers to average over, such as `q_proj` (empty: every layer that all these runs have)."""

    def draw(self, results: Any) -> MatplotlibFigure | None:
        from lorabench.report import drawing
        from lorabench.report.figures._curves import draw_lines, handles, settings
        from lorabench.report.results import selected
        from lorabench.report.update_metrics import common_layers, metric_rows, per_run

        rows = metric_rows(results, f"survival.{self.metric}", selected(results).done, self.kinds)
        if rows.empty:
            return None
        found, looks = settings(results, per_run(results, common_layers(rows, "k"), ["side", "k"]), self.most)
        found["panel"] = found["side"].map(TITLES)
        with drawing.style():
            grid = drawing.facets(sorted(found["panel"].unique()), self.width)
            for title, axes in grid.axes_dict.items():
                draw_lines(axes, found[found["panel"] == title], looks, "k", within=(0, 1), null=drawing.REFERENCE)
            drawing.powers_of_two(axes, [2**k for k in range(int(found["k"].max()).bit_length())])
            what = "φ(k, k)" if self.metric == "survival_at" else "|cos|"
            grid.set_axis_labels(
                "Number of top directions k" if self.metric == "survival_at" else "Direction k",
                f"{what}, W0 and W0 + ΔW",
            )
            axes.set_ylim(0, 1.03)
            drawing.legend_below(grid.figure, handles(looks) | drawing.null_handle("chance"))
        return grid.figure

    def caption(self) -> str:
        from lorabench.report.update_metrics import UNSHARED

        what = (
            "How much of the span of the k top singular directions of W0 lies in that of W0 + ΔW, φ(k, k)"
            if self.metric == "survival_at"
            else "|cos| between the k-th singular direction of W0 and the k-th of W0 + ΔW"
        )
        return (
            f"{what} (1: untouched): means over the layers{self.of_kinds} that all runs have {UNSHARED} and over "
            "seeds. Dashed: random directions."
        )


EXAMPLE = SurvivalCurves()
