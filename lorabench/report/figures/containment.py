"""How much of one run's ΔW lies in the subspace of another's, and the reverse, beside chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lorabench.report.labels import series_label
from lorabench.report.update_metrics import NULL, VALUE, rows_of
from lorabench.spec.figure import Canvas, Figure, Frame

MAX_ROWS = 12
WIDEST = 26
"""Characters of a name that stands in one line."""
PREFERRED = ("method", "method.rank", "seed")
ROLES = {"energy_a_in_b": ("run_a", "run_b"), "energy_b_in_a": ("run_b", "run_a")}
XLABEL = "Share of A's ‖ΔW‖²\nin the subspace of B"


@dataclass(frozen=True, kw_only=True)
class Containment(Figure):
    """A line a setting in another, a marker a side of the layers."""

    section: ClassVar[str] = "pairs"
    needs: ClassVar[str] = "two runs with a ΔW that differ in one setting"

    between: str | None = None
    """The axis in which the two runs differ (None: methods where they were compared, else ranks, else seeds)."""
    sides: Literal["input", "output", "both"] = "both"
    """Right singular vectors (the layer's input), left ones (its output), or both."""
    kinds: tuple[str, ...] = ()
    """Kinds of layers to average over, such as `q_proj` (empty: all that both runs have)."""

    def draw(self, results: Any) -> Canvas | None:
        import pandas as pd

        from lorabench.report import drawing
        from lorabench.report.figures._curves import draw_points, measured

        rows = self._rows(results)
        if rows.empty:
            return None
        names = list(dict.fromkeys(rows["what"]))[:MAX_ROWS]
        looks = drawing.looks(side for side in ("input", "output") if (rows["side"] == side).any())
        points = []
        for (name, side), chunk in rows[rows["what"].isin(names)].groupby(["what", "side"], sort=False):
            y = names.index(name) + 0.16 * ([*looks].index(side) - (len(looks) - 1) / 2)
            look = {"color": looks[side].color, "marker": looks[side].marker}
            points.append(measured(chunk, VALUE, "x", (0, 1)) | dict.fromkeys(("y", "y_low", "y_high"), y) | look)
        height = 1.0 + (0.12 + 0.09 * (1 + any("\n" in name for name in names))) * len(names)
        with drawing.facets([""], self.width, height=height) as grid:
            axes = grid.axes.flat[0]
            draw_points(axes, pd.DataFrame(points))
            chance = [(point["null"], point["y"]) for point in points if point["null"] is not None]
            for null, y in chance:
                axes.plot(null, y, "|", markersize=7, color=drawing.REFERENCE, zorder=1)
            axes.set(xlim=(-0.02, 1.02), ylim=(len(names) - 0.5, -0.5), xlabel=XLABEL, ylabel="A in B")
            axes.set_yticks(range(len(names)), names)
            axes.grid(axis="y", visible=False)
            entries = {f"{side} side": look for side, look in looks.items()}
            entries |= {"chance": drawing.Look(drawing.REFERENCE, "|")} if chance else {}
            drawing.legend_below(grid.figure, entries, lines=False)
        return grid.figure

    def _rows(self, results: Any) -> Frame:
        """A row a pair of runs, side and direction, with `what` it is called; `seed` is that of the first run."""
        from lorabench.report.results import whole_layers

        frame = rows_of(results, "overlap", kinds=self.kinds)
        if frame.empty:
            return frame
        axes = list(frame["axis"].unique())
        between = self.between or next(axis for axis in (*PREFERRED, *axes) if axis in axes)
        sides = [self.sides] if self.sides != "both" else ["input", "output"]
        frame = frame[(frame["axis"] == between) & frame["metric"].isin(ROLES) & frame["side"].isin(sides)]
        keys = ["run_a", "run_b", "side", "metric"]
        frame = (frame if self.kinds else whole_layers(frame)).astype(dict.fromkeys(keys, str))
        found = frame.groupby(keys, sort=False)[["value", "null"]].mean().reset_index()
        names = [self._name(results, row, between) for _, row in found.iterrows()]
        found = found.assign(what=names).join(results.runs[["seed", "status"]], on="run_a")
        found = found.rename(columns={"null": NULL})
        return found.assign(seed=0) if between == "seed" else found  # pairs share runs: no interval from their spread

    def _name(self, results: Any, row: Any, between: str) -> str:
        """`full in lora, rank 16`, in two lines where it is long; of two seeds one `in another seed`."""
        settings = (results.runs.loc[row[run], results.settings] for run in ROLES[row["metric"]])
        first, second = (series_label(results.settings, list(values)) for values in settings)
        second = "another seed" if between == "seed" else second
        return f"{first}{' ' if len(first + second) <= WIDEST else chr(10)}in {second}"

    def caption(self) -> str:
        return (
            "Share of the squared Frobenius norm of one run's ΔW in the subspace of another's (all its meaningful "
            f"directions; of a dense ΔW the top 64): means over layers{self.of_kinds} and seeds (pairs of seeds share "
            "runs, and give no interval). Vertical dashes: the share in a random subspace of the same dimension, which "
            "for a large one is high by itself. At most twelve, in the sweep's order."
        )


EXAMPLE = Containment()
