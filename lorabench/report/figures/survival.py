"""How far the top singular directions of W0 survive in W0 + ΔW, beside chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.figure import Figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

    from lorabench.report.figures._curves import Curve

MAX_LINES = 8
TITLES = {"input": "input side (right)", "output": "output side (left)"}


@dataclass(frozen=True, kw_only=True)
class SurvivalCurves(Figure):
    """A panel a side, a colour a setting."""

    section: ClassVar[str] = "base"

    metric: Literal["survival_at", "direction_cosine"] = "survival_at"
    """φ(k, k) of the top k directions together, or |cos| of the k-th one with its successor."""
    kinds: tuple[str, ...] = ()
    """Kinds of layers to average over, such as `q_proj` (empty: every layer that all these runs have)."""

    def draw(self, results: Any) -> MatplotlibFigure | None:
        from lorabench.report import drawing
        from lorabench.report.figures._curves import draw_curve, null_handle

        panels = self._panels(results)
        if not panels:
            return None
        looks = drawing.looks(dict.fromkeys(name for lines in panels.values() for name in lines))
        with drawing.style():
            figure, grid = drawing.new_figure(1, len(panels), sharex=True, sharey=True)
            handles: dict[str, Any] = {}
            for axes, (side, lines) in zip(grid.flat, panels.items(), strict=True):
                handles |= {name: draw_curve(axes, line, looks[name], null=drawing.REFERENCE)
                            for name, line in lines.items()}  # fmt: skip
                axes.set_title(TITLES[side])
                axes.set_xlabel("Number of top directions k" if self.metric == "survival_at" else "Direction k")
            last = max(x for lines in panels.values() for line in lines.values() for x, _ in line)
            drawing.powers_of_two(grid[0, 0], [2**k for k in range(int(last).bit_length())])
            what = "φ(k, k)" if self.metric == "survival_at" else "|cos|"
            grid[0, 0].set_ylabel(f"{what}, W0 and W0 + ΔW")
            grid[0, 0].set_ylim(0, 1.03)
            handles |= null_handle("chance")
            drawing.legend_below(figure, list(handles.values()), list(handles))
        return figure

    def _panels(self, results: Any) -> dict[str, dict[str, Curve]]:
        """Side -> setting -> its points over k."""
        from lorabench.report.figures._curves import curve
        from lorabench.report.results import selected
        from lorabench.report.update_metrics import by_setting, common_layers, metric_rows, per_run, shown_settings

        done = selected(results).done
        rows = metric_rows(results, f"survival.{self.metric}", done)
        if len(rows) and self.kinds:
            rows = rows[rows["kind"].isin(self.kinds)]
        if rows.empty:
            return {}
        found = per_run(results, common_layers(rows, "k"), ["side", "k"])
        settings = shown_settings(results, found, MAX_LINES)
        panels: dict[str, dict[str, Curve]] = {side: {} for side in TITLES}
        for label, chunk in by_setting(results, found, settings):
            for side in TITLES:
                panels[side][label] = curve(chunk[chunk["side"] == side], "k")
        return panels

    def caption(self) -> str:
        from lorabench.report.update_metrics import THINNED, UNSHARED

        of = f" ({', '.join(self.kinds)})" if self.kinds else ""
        what = (
            "How much of the span of the k top singular directions of W0 lies in that of W0 + ΔW, φ(k, k)"
            if self.metric == "survival_at"
            else "|cos| between the k-th singular direction of W0 and the k-th of W0 + ΔW"
        )
        return (
            f"{what} (1: untouched): means over the layers{of} that all runs have {UNSHARED} and over seeds, bands 95% "
            "Student-t intervals over seeds (hollow: a single seed), settings at their own best learning rate. Dashed: "
            "random directions. " + THINNED
        )


EXAMPLE = SurvivalCurves()
