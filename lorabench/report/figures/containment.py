"""How much of one run's ΔW lies in the subspace of another's, and the reverse, beside chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.figure import Figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as MatplotlibFigure

MAX_ROWS = 12
WIDEST = 26
"""Characters of a name that stands in one line."""
PREFERRED = ("method", "method.rank", "seed")
ROLES = {"energy_a_in_b": ("a", "b"), "energy_b_in_a": ("b", "a")}


@dataclass(frozen=True, kw_only=True)
class Containment(Figure):
    """A line a setting in another, a marker a side of the layers."""

    section: ClassVar[str] = "pairs"

    between: str | None = None
    """The axis in which the two runs differ (None: methods where they were compared, else ranks, else seeds)."""
    sides: Literal["input", "output", "both"] = "both"
    """Right singular vectors (the layer's input), left ones (its output), or both."""
    kinds: tuple[str, ...] = ()
    """Kinds of layers to average over, such as `q_proj` (empty: all that both runs have)."""

    def draw(self, results: Any) -> MatplotlibFigure | None:
        from lorabench.report import drawing
        from lorabench.report.figures._curves import draw_points

        rows = _rows(results, self)
        if rows.empty:
            return None
        names = list(dict.fromkeys(rows["what"]))[:MAX_ROWS]
        points, looks = _points(rows, names)
        with drawing.style():
            lines = 1 + any("\n" in name for name in names)
            height = 1.0 + (0.12 + 0.09 * lines) * len(names)
            grid = drawing.facets([""], self.width, height=height)
            axes = grid.axes.flat[0]
            draw_points(axes, points)
            known = points.dropna(subset=["null"])
            for null, y in known[["null", "y"]].to_numpy(float):
                axes.plot(null, y, "|", markersize=7, color=drawing.REFERENCE, zorder=1)
            axes.set(
                xlim=(-0.02, 1.02), ylim=(len(names) - 0.5, -0.5), xlabel="Share of A's ‖ΔW‖²\nin the subspace of B"
            )
            axes.set_yticks(range(len(names)), names)
            axes.set_ylabel("A in B")
            axes.grid(axis="y", visible=False)
            handles = {f"{side} side": look.handle_alone for side, look in looks.items()}
            chance = drawing.Look(drawing.REFERENCE, "|", "none").handle
            drawing.legend_below(grid.figure, handles | ({"chance": chance} if len(known) else {}))
        return grid.figure

    def caption(self) -> str:
        return (
            "Share of the squared Frobenius norm of one run's ΔW in the subspace of another's (all its meaningful "
            f"directions; of a dense ΔW the top 64): means over layers{self.of_kinds} and seeds (pairs of seeds share "
            "runs, and give no interval). Vertical dashes: the share in a random subspace of the same dimension, which "
            "for a large one is high by itself. At most twelve, in the sweep's order."
        )


EXAMPLE = Containment()


def _rows(results: Any, figure: Containment) -> pd.DataFrame:
    """A row a pair of runs, side and direction, with `what` it is called; `seed` is that of the first run."""
    import pandas as pd

    from lorabench.report.results import selected, whole_layers

    frame = results.analyses.get("overlap", pd.DataFrame())
    if frame.empty:
        return frame
    runs = selected(results).done
    frame = frame[frame["run_a"].isin(runs.index) & frame["run_b"].isin(runs.index) & frame["metric"].isin(ROLES)]
    axes = list(dict.fromkeys(frame["axis"]))
    between = figure.between or next((axis for axis in (*PREFERRED, *axes) if axis in axes), None)
    frame = frame[frame["axis"] == between]
    frame = frame[frame["kind"].isin(figure.kinds)] if figure.kinds else whole_layers(frame)
    frame = frame if figure.sides == "both" else frame[frame["side"] == figure.sides]
    if frame.empty:
        return frame
    keys = ["run_a", "run_b", "side", "metric"]
    found = frame.astype(dict.fromkeys(keys, str)).groupby(keys, sort=False)[["value", "null"]].mean().reset_index()
    found["what"] = [
        _name(results, {"a": a, "b": b}, metric, between)
        for a, b, metric in zip(found["run_a"], found["run_b"], found["metric"], strict=True)
    ]
    found = found.join(runs[["seed", "status"]], on="run_a").rename(columns={"null": "value:null"})
    return found.assign(seed=0) if between == "seed" else found  # pairs share runs: their spread gives no interval


def _name(results: Any, runs: dict[str, str], metric: str, between: str | None) -> str:
    """`full in lora, rank 16`, in two lines where it is long; of two seeds one `in another seed`."""
    from lorabench.report.labels import series_label

    first, second = (
        series_label(results.settings, list(results.runs.loc[runs[role], results.settings])) for role in ROLES[metric]
    )
    second = "another seed" if between == "seed" else second
    gap = " " if len(first + second) <= WIDEST else "\n"
    return f"{first}{gap}in {second}"


def _points(rows: pd.DataFrame, names: list[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A row a name and side, and the looks of the sides."""
    import pandas as pd

    from lorabench.report import drawing
    from lorabench.report.figures._curves import measured

    sides = [side for side in ("input", "output") if (rows["side"] == side).any()]
    looks = drawing.looks(sides)
    points = []
    for position, side in enumerate(sides):
        offset = 0.16 * (position - (len(sides) - 1) / 2)
        for place, name in enumerate(names):
            item = measured(rows[(rows["side"] == side) & (rows["what"] == name)], "value", (0, 1), "x")
            y = dict.fromkeys(("y", "y_low", "y_high"), place + offset)
            points += [item | y | {"color": looks[side].color, "marker": looks[side].marker}] if item else []
    return pd.DataFrame(points), looks
