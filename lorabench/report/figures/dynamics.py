"""ΔW over the steps of training: its rank, its size, and how near its subspace is to the final one, beside chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.spec.figure import Figure

if TYPE_CHECKING:
    import pandas as pd
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
    """A panel a metric, a look a setting."""

    section: ClassVar[str] = "training"

    kinds: tuple[str, ...] = ()
    """Kinds of layers to average over, such as `q_proj` (empty: every layer that all these runs have)."""

    def draw(self, results: Any) -> MatplotlibFigure | None:
        from lorabench.report import drawing
        from lorabench.report.figures._curves import draw_lines, handles, settings

        values = _values(results, self.kinds)
        if values.empty:
            return None
        found, looks = settings(results, values)
        metrics = [metric for metric in PANELS if (found["metric"] == metric).any()]
        with drawing.style():
            grid = drawing.facets(metrics, self.width, sharey=False)
            for metric, axes in grid.axes_dict.items():
                chunk = found[found["metric"] == metric]
                within = (0, 1) if "phi" in metric else (-1, 1) if "cosine" in metric else (0, float("inf"))
                draw_lines(axes, chunk, looks, "step", within=within)
                axes.set(title="", ylabel=PANELS[metric])
                if "phi" in metric:
                    axes.set_ylim(0, 1.04)
                elif "rank" in metric:
                    drawing.limit([axes])
            grid.set_xlabels("Step")
            drawing.legend_below(grid.figure, handles(looks) | drawing.null_handle("random"))
        return grid.figure

    def caption(self) -> str:
        return (
            f"ΔW after each snapshot: mean over layers{self.of_kinds} and seeds; φ(k, k) with the final ΔW at the k "
            "directions that hold 90% of its energy. Dashed: random updates of the same shapes and ranks, and the "
            "similarity of random subspaces."
        )


EXAMPLE = Dynamics()


def _values(results: Any, kinds: tuple[str, ...]) -> pd.DataFrame:
    """One row a selected run, metric and step: means over the layers that all runs have."""
    import pandas as pd

    from lorabench.report.results import selected, shared
    from lorabench.report.update_metrics import chosen, per_run

    frame = chosen(results.analyses.get("dynamics", pd.DataFrame()), selected(results).done, kinds)
    if frame.empty:
        return frame
    frame = shared(frame[frame["metric"].isin(list(PANELS)) & frame["step"].notna() & frame["value"].notna()])
    frame = frame.astype({"run_id": str, "metric": str, "value": float, "null": float})
    return per_run(results, frame, ["metric", "step"])
