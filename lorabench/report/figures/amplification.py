"""Amplification: how much ΔW strengthens what W0 already does in ΔW's own directions, beside random ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.spec.figure import Figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as MatplotlibFigure


@dataclass(frozen=True, kw_only=True)
class Amplification(Figure):
    """Left against the number of directions, right by kind of module with all of them; a look a setting."""

    section: ClassVar[str] = "base"
    most: ClassVar[int] = 7

    kinds: tuple[str, ...] = ()
    """Kinds of layers, such as `q_proj` (empty: all)."""

    def draw(self, results: Any) -> MatplotlibFigure | None:
        from lorabench.report import drawing
        from lorabench.report.figures._curves import SERIES, draw_lines, handles, settings
        from lorabench.report.results import selected, shared
        from lorabench.report.update_metrics import metric_rows, ordered_kinds, per_run

        done = selected(results).done
        whole, growing = (
            metric_rows(results, f"alignment.{metric}", done, self.kinds)
            for metric in ("amplification", "amplification_at")
        )
        if whole.empty:
            return None
        by_kind, looks = settings(results, per_run(results, whole, ["kind"], "geometric"), self.most)
        by_count, _ = settings(results, per_run(results, _of_all_layers(shared(growing)), ["r"], "geometric"))
        by_count = by_count[by_count[SERIES].isin(looks)]
        kinds = ordered_kinds(by_kind["kind"])
        by_kind["place"] = by_kind["kind"].map(kinds.index)
        titles = [", ".join(self.kinds) or "mean over all layers", "all directions of ΔW (at most 64)"]
        with drawing.style():
            grid = drawing.facets(titles, self.width, height=2.5, sharex=False, sharey=False)
            count, kind = grid.axes.flat
            draw_lines(count, by_count, looks, "r", logs=True)
            drawing.powers_of_two(count, by_count["r"])
            count.set_xlabel("Top directions r of ΔW that U and V hold")
            for _, rows in by_kind.groupby("kind"):  # points beside one another, which no line joins
                draw_lines(kind, rows, looks, "place", bars=0.8 / len(looks), logs=True)
            kind.set_xticks(range(len(kinds)), kinds, rotation=25, ha="right", rotation_mode="anchor")
            kind.set_xlabel("")
            kind.grid(axis="x", visible=False)
            for axes in (count, kind):
                axes.set(yscale="log", ylabel="Amplification ‖ΔW‖ / ‖Uᵀ W0 V‖")
                drawing.plain_logarithmic(axes.yaxis)
            drawing.legend_below(grid.figure, handles(looks) | drawing.null_handle("random U, V"))
        return grid.figure

    def caption(self) -> str:
        return (
            "Amplification factor of ΔW, ‖ΔW‖ over ‖Uᵀ W0 V‖ with U and V the top singular directions of ΔW (Hu et al. "
            f"2021, section 7.3 and table 7): geometric means over layers{self.of_kinds} and seeds, intervals of the "
            "logarithm. Dashed, or a dash: random U and V. Below it, ΔW goes where W0 is stronger than by chance; "
            "above it, where W0 does less. The factor falls with r, so settings compare at one r."
        )


EXAMPLE = Amplification()


def _of_all_layers(rows: pd.DataFrame) -> pd.DataFrame:
    """Each run up to the r that all its layers have: past it the mean would be over the larger ones alone."""
    at_r = rows.groupby(["run_id", "r"])["layer"].transform("nunique")
    return rows[at_r == rows.groupby("run_id")["layer"].transform("nunique")]
