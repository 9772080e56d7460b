"""Intruder dimensions against ε and against k, beside random directions, and forgetting against their number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Le

from lorabench.spec.figure import Figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

    from lorabench.report.drawing import Look

MAX_LINES = 7
FEWEST = 5
"""Runs that a rank correlation needs: of four even the most extreme order has p = 1/12."""


@dataclass(frozen=True, kw_only=True)
class IntruderCurves(Figure):
    """A colour a setting; counts are summed over matrices, as in the paper, those that all runs have."""

    section: ClassVar[str] = "base"

    k: Annotated[int, Ge(1)] = 10
    """Top directions where ε varies (the nearest of those that were counted)."""
    epsilon: Annotated[float, Ge(0), Le(1)] = 0.5
    """Threshold where k varies (the nearest of those that were counted)."""
    value: str = "forgetting"
    """What is drawn against the number of intruders, a point a run, where the runs have it."""

    @property
    def measures(self) -> list[str]:
        return [self.value] if self.value != "forgetting" else []

    def draw(self, results: Any) -> MatplotlibFigure | None:
        from lorabench.report import drawing
        from lorabench.report.figures._curves import null_handle
        from lorabench.report.results import selected
        from lorabench.report.update_metrics import by_setting, shown_settings

        counts, matrices = _counts(results)
        chosen = counts[counts.index.isin(selected(results).done.index)]
        if chosen.empty:
            return None
        k, epsilon = (_nearest(counts[key], getattr(self, key)) for key in ("k", "epsilon"))
        at_both = counts[(counts["k"] == k) & (counts["epsilon"] == epsilon)]
        points = drawing.finite(at_both.join(results.runs.filter([self.value])), self.value)
        settings = shown_settings(results, chosen, MAX_LINES)
        lines = by_setting(results, chosen, settings)
        looks = drawing.looks(label for label, _ in lines)
        with drawing.style():
            figure, grid = drawing.new_figure(1, 3 if len(points) > 1 else 2)
            handles = _panel(grid[0, 0], [(label, rows[rows["k"] == k]) for label, rows in lines], "epsilon", looks)
            grid[0, 0].set(xlabel="Threshold ε of |cos|", ylabel=f"Intruders in {matrices}")
            grid[0, 0].set_title(f"top k = {k:g} of each matrix")
            _panel(grid[0, 1], [(label, rows[rows["epsilon"] == epsilon]) for label, rows in lines], "k", looks)
            grid[0, 1].set(xlabel="Top directions k of each matrix", title=f"ε = {epsilon:g}")
            for axes in grid[0, 2:]:
                _scatter(axes, points, by_setting(results, points, settings), looks, self.value)
                axes.set_xlabel(f"Intruders (k = {k:g}, ε = {epsilon:g})")
            shares = {label: _degenerate(at_both[at_both.index.isin(rows.index)]) for label, rows in lines}
            handles = {label + shares[label]: handle for label, handle in handles.items()}
            handles |= null_handle("random directions")
            drawing.legend_below(figure, list(handles.values()), list(handles))
        return figure

    def caption(self) -> str:
        from lorabench.report.update_metrics import THINNED, UNSHARED

        return (
            "Intruder dimensions: top left singular vectors of W0 + ΔW whose |cos| with every one of W0 is below ε, "
            f"summed over the matrices that all runs have {UNSHARED}: Shuttleworth et al. 2024. Means over seeds with "
            "95% Student-t bands (hollow: a single seed), settings at their own best learning rate. Dashed: the "
            "same singular values of ΔW in random directions. Degenerate: the share of intruders whose singular value "
            "is within 1% of a neighbour's, so that the single vector means little. Right: a point a run, all learning "
            "rates, grey where the setting has no curve; Spearman's ρ over all of them, whatever else they differ in. "
            + THINNED
        )


EXAMPLE = IntruderCurves()


def _counts(results: Any) -> tuple[pd.DataFrame, str]:
    """The sum over matrices of each run that is done, at each (ε, k), and of which matrices."""
    from lorabench.report.update_metrics import common_layers, metric_rows, per_run
    from lorabench.store.record import Status

    done = results.runs[results.runs["status"] == Status.DONE]
    rows = metric_rows(results, "intruders.count", done)
    if rows.empty:
        return rows, ""
    rows = common_layers(rows, "k")
    counts = rows.groupby("run_id")["layer"].nunique()
    matrices = f"{counts.max()} matrices" if rows["layer"].nunique() == counts.min() else "its own matrices"
    return per_run(results, rows, ["epsilon", "k"], "sum"), matrices


def _nearest(values: pd.Series, wanted: float) -> float:
    return min(values.unique(), key=lambda value: abs(value - wanted))


def _panel(axes: Axes, lines: list[tuple[str, pd.DataFrame]], x: str, looks: dict[str, Look]) -> dict[str, Any]:
    from matplotlib.ticker import MaxNLocator

    from lorabench.report.figures._curves import curve, draw_curve

    handles = {label: draw_curve(axes, curve(rows, x), looks[label]) for label, rows in lines}
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return handles


def _scatter(
    axes: Axes, points: pd.DataFrame, groups: list[tuple[str, pd.DataFrame]], looks: dict[str, Look], value: str
) -> None:
    """A point a run, and their rank correlation where there are enough."""
    from matplotlib.ticker import MaxNLocator
    from scipy import stats

    from lorabench.report.labels import capitalized, measure, with_unit

    factor = 100.0 if measure(value).unit == "%" else 1.0
    known = {run_id for _, rows in groups for run_id in rows.index}
    others = points[~points.index.isin(known)]
    axes.plot(others["value"], factor * others[value], "o", color="#B5B5B5", markersize=3, linestyle="none")
    for label, rows in groups:
        look = looks[label]
        axes.plot(rows["value"], factor * rows[value], look.marker, color=look.color, markersize=4, linestyle="none")
    axes.margins(0.08)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_ylabel(capitalized(with_unit(value)))
    title = f"{len(points)} runs"
    if len(points) >= FEWEST and points["value"].nunique() > 1 and points[value].nunique() > 1:
        found = stats.spearmanr(points["value"], points[value])
        title = f"ρ = {found.statistic:.2f}, {_p_text(found.pvalue)}, {title}"
    axes.set_title(title.replace("-", "−"))


def _p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _degenerate(rows: pd.DataFrame) -> str:
    """` (12% degenerate)`; empty where there is no intruder."""
    total = rows["value"].sum()
    return f" ({100 * rows['num_degenerate'].sum() / total:.0f}% degenerate)" if total else ""
