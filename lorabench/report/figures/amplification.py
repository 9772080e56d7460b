"""Amplification: how much ΔW strengthens what W0 already does in ΔW's own directions, beside random ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.report.update_metrics import metric_rows, ordered_kinds, per_run
from lorabench.spec.figure import Canvas, Figure, Frame


@dataclass(frozen=True, kw_only=True)
class Amplification(Figure):
    """Left against the number of directions, right by kind of module with all of them; a look a setting."""

    section: ClassVar[str] = "base"
    needs: ClassVar[str] = "runs with a ΔW, and the W0 that it was added to"
    most: ClassVar[int] = 7

    kinds: tuple[str, ...] = ()
    """Kinds of layers, such as `q_proj` (empty: all)."""

    def draw(self, results: Any) -> Canvas | None:
        from lorabench.report import drawing
        from lorabench.report.figures._curves import SERIES, draw_lines, settings

        whole = metric_rows(results, "alignment.amplification", kinds=self.kinds)
        if whole.empty:
            return None
        growing = _of_all_layers(metric_rows(results, "alignment.amplification_at", kinds=self.kinds))
        by_kind, looks = settings(results, per_run(results, whole, ["kind"], "geometric"), self.most)
        by_count, _ = settings(results, per_run(results, growing, ["r"], "geometric"))
        by_count = by_count[by_count[SERIES].isin(looks)]
        kinds = ordered_kinds(by_kind["kind"])
        by_kind["place"] = by_kind["kind"].map(kinds.index)
        titles = [", ".join(self.kinds) or "mean over all layers", "all directions of ΔW (at most 64)"]
        with drawing.facets(titles, self.width, height=2.5, sharex=False, sharey=False) as grid:
            count, kind = grid.set(yscale="log", ylabel="Amplification ‖ΔW‖ / ‖Uᵀ W0 V‖").axes.flat
            draw_lines(count, by_count, looks, "r")
            drawing.powers_of_two(count, by_count["r"])
            count.set_xlabel("Top directions r of ΔW that U and V hold")
            for _, rows in by_kind.groupby("kind"):  # points beside one another, which no line joins
                draw_lines(kind, rows, looks, "place", apart=0.8 / len(looks))
            kind.set_xticks(range(len(kinds)), kinds, rotation=25, ha="right", rotation_mode="anchor")
            kind.set_xlabel("")
            kind.grid(axis="x", visible=False)
            for axes in (count, kind):
                drawing.plain_logarithmic(axes.yaxis)
            drawing.legend_below(grid.figure, looks, "random U, V")
        return grid.figure

    def caption(self) -> str:
        return (
            "Amplification factor of ΔW, ‖ΔW‖ over ‖Uᵀ W0 V‖ with U and V the top singular directions of ΔW (Hu et al. "
            f"2021, section 7.3 and table 7): geometric means over layers{self.of_kinds} and seeds, intervals of the "
            "logarithm. Dashed, or a dash: random U and V. Below it, ΔW goes where W0 is stronger than by chance; "
            "above it, where W0 does less. The factor falls with r, so settings compare at one r."
        )


EXAMPLE = Amplification()


def _of_all_layers(rows: Frame) -> Frame:
    """Each run up to the r that all its layers have: past it the mean would be over the larger ones alone."""
    from lorabench.report.results import shared

    rows = shared(rows)
    at_r = rows.groupby(["run_id", "r"])["layer"].transform("nunique")
    return rows[at_r == rows.groupby("run_id")["layer"].transform("nunique")]
