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
    from lorabench.report.figures._curves import Looks

FEWEST = 5
"""Runs that a rank correlation needs: of four even the most extreme order has p = 1/12."""


@dataclass(frozen=True, kw_only=True)
class IntruderCurves(Figure):
    """A colour a setting; counts are summed over matrices, as in the paper, those that all runs have."""

    section: ClassVar[str] = "base"
    most: ClassVar[int] = 7

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
        from lorabench.report.figures._curves import SERIES, handles, settings
        from lorabench.report.results import selected

        counts, matrices = _counts(results)
        chosen = counts[counts.index.isin(selected(results).done.index)]
        if chosen.empty:
            return None
        k, epsilon = (_nearest(counts[key], getattr(self, key)) for key in ("k", "epsilon"))
        at_both = counts[(counts["k"] == k) & (counts["epsilon"] == epsilon)]
        points = drawing.finite(at_both.join(results.runs.filter([self.value])), self.value)
        lines, looks = settings(results, chosen, self.most)
        series = {label: set(rows.index) for label, rows in lines.groupby(SERIES, sort=False)}
        shares = {label: _degenerate(at_both[at_both.index.isin(ids)]) for label, ids in series.items()}
        titles = [f"top k = {k:g} of each matrix", f"ε = {epsilon:g}", *(["runs"] if len(points) > 1 else [])]
        with drawing.style():
            grid = drawing.facets(titles, self.width, sharex=False, sharey=False)
            over_epsilon, over_k, *scatter = grid.axes.flat
            _panel(over_epsilon, lines[lines["k"] == k], "epsilon", looks)
            over_epsilon.set(xlabel="Threshold ε of |cos|", ylabel=f"Intruders in {matrices}")
            _panel(over_k, lines[lines["epsilon"] == epsilon], "k", looks)
            over_k.set(xlabel="Top directions k of each matrix", ylabel="")
            for axes in scatter:
                _scatter(axes, points, {label: (ids, looks[label]) for label, ids in series.items()}, self.value)
                axes.set_xlabel(f"Intruders (k = {k:g}, ε = {epsilon:g})")
            named = {label + shares[label]: handle for label, handle in handles(looks).items()}
            drawing.legend_below(grid.figure, named | drawing.null_handle("random directions"))
        return grid.figure

    def caption(self) -> str:
        from lorabench.report.update_metrics import UNSHARED

        return (
            "Intruder dimensions: top left singular vectors of W0 + ΔW whose |cos| with every one of W0 is below ε, "
            f"summed over the matrices that all runs have {UNSHARED}: Shuttleworth et al. 2024. Means over seeds. "
            "Dashed: the same singular values of ΔW in random directions. Degenerate: the share of intruders whose "
            "singular value is within 1% of a neighbour's, so that the single vector means little. Right: a point a "
            "run, selected or not, grey where the setting has no curve; Spearman's ρ over all of them, whatever else "
            "they differ in."
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


def _panel(axes: Axes, rows: pd.DataFrame, x: str, looks: Looks) -> None:
    from lorabench.report.drawing import whole_numbers
    from lorabench.report.figures._curves import draw_lines

    draw_lines(axes, rows, looks, x, within=(0, float("inf")))
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    whole_numbers(axes.yaxis)


def _scatter(axes: Axes, points: pd.DataFrame, groups: dict[str, tuple[set[str], Look]], value: str) -> None:
    """A point a run, in its setting's look, and their rank correlation where there are enough."""
    import seaborn as sns
    from scipy import stats

    from lorabench.report.drawing import Look, whole_numbers
    from lorabench.report.labels import capitalized, measure, with_unit

    factor = 100.0 if measure(value).unit == "%" else 1.0
    points = points.assign(**{value: factor * points[value]})
    known = set().union(*(ids for ids, _ in groups.values()))
    others = (set(points.index) - known, Look("#B5B5B5", "o"))
    for ids, look in [others, *groups.values()]:
        sns.scatterplot(
            points[points.index.isin(ids)], x="value", y=value, ax=axes, color=look.color, marker=look.marker, s=14,
            linewidth=0, legend=False,
        )  # fmt: skip
    axes.margins(0.08)
    whole_numbers(axes.xaxis)
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
