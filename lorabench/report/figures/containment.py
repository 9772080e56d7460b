"""How much of one run's ΔW lies in the subspace of another's, and the reverse, beside chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.figure import Figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
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

        rows = _rows(results, self)
        if rows.empty:
            return None
        names = list(dict.fromkeys(rows["what"]))[:MAX_ROWS]
        sides = [side for side in ("input", "output") if (rows["side"] == side).any()]
        looks = drawing.looks(sides)
        with drawing.style():
            lines = 1 + any("\n" in name for name in names)
            figure, grid = drawing.new_figure(1, 1, height=1.0 + (0.12 + 0.09 * lines) * len(names))
            axes = grid[0, 0]
            handles: dict[str, Any] = {}
            for position, side in enumerate(sides):
                offset = 0.16 * (position - (len(sides) - 1) / 2)
                handles |= _points(axes, rows[rows["side"] == side], names, offset, looks[side], side)
            axes.set(
                xlim=(-0.02, 1.02), ylim=(len(names) - 0.5, -0.5), xlabel="Share of A's ‖ΔW‖²\nin the subspace of B"
            )
            axes.set_yticks(range(len(names)), names)
            axes.set_ylabel("A in B")
            axes.grid(axis="y", visible=False)
            handles |= {"chance": handles.pop("chance")} if "chance" in handles else {}
            drawing.legend_below(figure, list(handles.values()), list(handles), columns=3)
        return figure

    def caption(self) -> str:
        of = f" ({', '.join(self.kinds)})" if self.kinds else ""
        return (
            "Share of the squared Frobenius norm of one run's ΔW in the subspace of another's (all its meaningful "
            f"directions; of a dense ΔW the top 64): means over layers{of} and seeds with 95% Student-t intervals over "
            "seeds (hollow: a single one, or pairs of seeds, which share runs). Vertical dashes: the share in a random "
            "subspace of the same dimension, which for a large one is high by itself. At most twelve, in the sweep's "
            "order."
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


def _points(axes: Axes, rows: pd.DataFrame, names: list[str], offset: float, look: Any, side: str) -> dict[str, Any]:
    from lorabench.report.aggregate import cell
    from lorabench.report.drawing import REFERENCE

    handles: dict[str, Any] = {}
    for place, name in enumerate(names):
        item = cell(rows[rows["what"] == name], "value")
        if item.mean is None:
            continue
        y = place + offset
        handle = axes.errorbar(
            item.center, y, xerr=item.half or 0.0, color=look.color, marker=look.marker, linestyle="none",
            elinewidth=0.8, markersize=3.5, markerfacecolor="white" if item.half is None else look.color,
        )  # fmt: skip
        handles.setdefault(f"{side} side", handle)
        if item.null is not None:
            (handles["chance"],) = axes.plot(
                item.null, y, marker="|", markersize=7, color=REFERENCE, linestyle="none", zorder=1
            )
    return handles
