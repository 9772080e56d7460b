"""What ΔW does along each of W0's singular directions, over what a random update of its size does there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.report.update_metrics import NULL, VALUE, common_layers, metric_rows, per_run
from lorabench.spec.figure import Canvas, Figure, Frame

PANELS = {
    ("response", "input"): ("input side", "‖ΔW vᵢ‖ / random"),
    ("response", "output"): ("output side", "‖ΔWᵀ uᵢ‖ / random"),
    ("diagonal", "both"): ("both sides", "|uᵢᵀ ΔW vᵢ| / random"),
}


@dataclass(frozen=True, kw_only=True)
class ProfileCurves(Figure):
    """A panel a measure, a look a setting."""

    section: ClassVar[str] = "base"
    most: ClassVar[int] = 5

    kinds: tuple[str, ...] = ()
    """Kinds of layers to average over, such as `q_proj` (empty: every layer that all these runs have)."""

    def draw(self, results: Any) -> Canvas | None:
        from lorabench.report import drawing
        from lorabench.report.figures._curves import draw_lines, settings

        tables = {place: self._squares(results, *place) for place in PANELS}
        tables = {place: rows for place, rows in tables.items() if not rows.empty}
        if not tables:
            return None
        with drawing.facets([PANELS[place][0] for place in tables], self.width, sharey=False) as grid:
            for (place, rows), axes in zip(tables.items(), grid.axes.flat, strict=True):
                found, looks = settings(results, per_run(results, rows, ["first"]), self.most)
                found = found.assign(**{VALUE: found[VALUE] ** 0.5, NULL: float("nan")})
                axes.set(xscale="log", yscale="log")
                draw_lines(axes, found, looks, "first")
                band = per_run(results, rows.assign(value=rows["spread"]), ["first"]).groupby("first")[VALUE].max()
                axes.fill_between(
                    band.index, 1 / (1 + 2 * band), 1 + 2 * band, color=drawing.REFERENCE, alpha=0.2, lw=0
                )
                axes.axhline(1, color=drawing.REFERENCE, linestyle=drawing.NULL_DASHES, linewidth=0.9, zorder=2)
                axes.set(ylabel=PANELS[place][1])
                drawing.plain_logarithmic(axes.yaxis)
                drawing.powers_of_two(axes, found["first"])
            grid.set_xlabels("Direction i of W0")
            drawing.legend_below(grid.figure, looks, "random")
        return grid.figure

    def _squares(self, results: Any, metric: str, side: str) -> Frame:
        """`value`: the mean square over that of a random update; `spread`: a random one's, of the root of its mean."""
        rows = metric_rows(results, f"profile.{metric}", kinds=self.kinds)
        rows = rows if rows.empty else rows[rows["side"] == side]
        if rows.empty:
            return rows
        rows = common_layers(rows, "first")
        counts = rows.groupby("run_id")["layer"].transform("nunique")
        null, std = rows["null"], rows["null_std"].astype(float)
        squares = rows["value"] ** 2 / (null**2 + std**2)
        return rows.assign(value=squares, spread=std / null / counts**0.5, null=1.0)

    def caption(self) -> str:
        return (
            "ΔW along the singular directions of W0, the top one at the left: what it answers to each, over what a "
            f"random update with its singular values does, root mean square over half octaves, layers{self.of_kinds} "
            "that all runs have (where there is none: each run's own), geometric mean over seeds. Above 1 at the left, "
            "it changes what W0 does most. Grey: two standard deviations of a random update, of the setting where they "
            "are widest."
        )


EXAMPLE = ProfileCurves()
