"""Intruder dimensions against ε and against k, beside random directions, and forgetting against their number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Le

from lorabench.report.labels import shown_factor
from lorabench.report.update_metrics import axis_label, common_layers, metric_rows, per_run
from lorabench.spec.figure import Axes, Canvas, Figure, Frame
from lorabench.store.record import Status

FEWEST = 5
"""Settings that a rank correlation needs: of four even the most extreme order has p = 1/12."""
XLABELS = {"epsilon": "Threshold ε of |cos|", "k": "Top directions k of each matrix"}


@dataclass(frozen=True, kw_only=True)
class IntruderCurves(Figure):
    """A colour a setting; counts are summed over matrices, as in the paper, those that all runs have."""

    section: ClassVar[str] = "base"
    needs: ClassVar[str] = "runs with a ΔW, and the W0 that it was added to"
    most: ClassVar[int] = 7

    k: Annotated[int, Ge(1)] = 10
    """Top directions where ε varies (the nearest of those that were counted)."""
    epsilon: Annotated[float, Ge(0), Le(1)] = 0.5
    """Threshold where k varies (the nearest of those that were counted)."""
    value: str = "forgetting"
    """What is drawn against the number of intruders, a point a run, where the runs have it."""

    @property
    def measures(self) -> list[str]:
        return [] if self.value == IntruderCurves.value else super().measures

    def draw(self, results: Any) -> Canvas | None:
        from lorabench.report import drawing
        from lorabench.report.figures._curves import SERIES, draw_lines, settings

        counts, matrices = _counts(results)
        chosen = counts[counts.index.isin(results.selection.run_ids)]
        if chosen.empty:
            return None
        k, epsilon = (min(counts[key], key=lambda found: abs(found - getattr(self, key))) for key in ("k", "epsilon"))
        lines, looks = settings(results, chosen, self.most)
        series = lines[SERIES].groupby(level=0).first()
        at_both = counts[(counts["k"] == k) & (counts["epsilon"] == epsilon)].join(series)
        keys = _keys(results)
        about = results.runs.filter([self.value, "unstable", *keys]).drop(columns=at_both.columns, errors="ignore")
        points = drawing.finite(at_both.join(about), self.value)
        sums = at_both.groupby(SERIES)[["num_degenerate", "value"]].sum().query("value > 0")
        shares = (100 * sums["num_degenerate"] / sums["value"]).map(" ({:.0f}% degenerate)".format)
        titles = [f"top k = {k:g} of each matrix", f"ε = {epsilon:g}", *(["runs"] if len(points) > 1 else [])]
        with drawing.facets(titles, self.width, sharex=False, sharey=False) as grid:
            curves = {"epsilon": lines[lines["k"] == k], "k": lines[lines["epsilon"] == epsilon]}
            for axes, (x, rows) in zip(grid.axes.flat, curves.items(), strict=False):
                draw_lines(axes, rows, looks, x, within=(0, float("inf")))
                axes.set(ylim=(0, max(1.0, axes.get_ylim()[1])), xlabel=XLABELS[x], ylabel="")
                drawing.whole_numbers(axes.yaxis)
            grid.axes.flat[0].set_ylabel(f"Intruders in {matrices}")
            for axes in grid.axes.flat[2:]:
                _scatter(axes, points, looks, self.value)
                axes.set_title(_correlations(points, keys, self.value))
                axes.set_xlabel(f"Intruders (k = {k:g}, ε = {epsilon:g})")
            named = {label + shares.get(label, ""): look for label, look in looks.items()}
            drawing.legend_below(grid.figure, named, "random directions")
        return grid.figure

    def caption(self) -> str:
        return (
            "Intruder dimensions: top left singular vectors of W0 + ΔW whose |cos| with every one of W0 is below ε, "
            "summed over the matrices that all runs have (where there is none: each run's own): Shuttleworth et al. "
            "2024. Means over seeds. Dashed: the same singular values of ΔW in random directions. Degenerate: the "
            "share of intruders whose singular value is within 1% of a neighbour's, so that the single vector means "
            "little. Right: a point a run, selected or not, grey where the setting has no curve, crossed where its "
            "training was unstable; Spearman's ρ over the means of all settings, learning rates apart, whatever they "
            "differ in: seeds of one setting are no evidence of their own."
        )

    def notes(self, results: Any) -> list[str]:
        from lorabench.report import drawing
        from lorabench.report.aggregate import unstable

        runs = drawing.finite(results.runs[results.runs["status"] == Status.DONE], self.value)
        runs = runs[runs.index.isin(results.analyses["intruders"]["run_id"])]
        num_all, num_stable = (len(_settings(each, _keys(results))) for each in (runs, runs.drop(index=unstable(runs))))
        if num_all < FEWEST:
            return []
        return [f"ρ: over {num_all} settings{f', {num_stable} without unstable runs' if unstable(runs) else ''}."]


EXAMPLE = IntruderCurves()


def _keys(results: Any) -> list[str]:
    """What tells settings apart, that which is selected included."""
    return [key for key in results.keys if key != "seed"]


def _counts(results: Any) -> tuple[Frame, str]:
    """The sum over matrices of each run that is done, at each (ε, k), and of which matrices."""
    rows = metric_rows(results, "intruders.count", results.runs[results.runs["status"] == Status.DONE])
    if rows.empty:
        return rows, ""
    rows = common_layers(rows, "k")
    counts = rows.groupby("run_id")["layer"].nunique()
    matrices = f"{counts.max()} matrices" if rows["layer"].nunique() == counts.min() else "its own matrices"
    return per_run(results, rows, ["epsilon", "k"], "sum"), matrices


def _scatter(axes: Axes, points: Frame, looks: dict[str, Any], value: str) -> None:
    """A point a run, in its setting's look."""
    import seaborn as sns

    from lorabench.report.drawing import Look, whole_numbers

    looks = {"": Look("#B5B5B5", "o")} | looks
    points = points.assign(**{value: shown_factor(value) * points[value]}).fillna({"series": ""}).sort_values("series")
    sns.scatterplot(
        points, x="value", y=value, ax=axes, s=14, linewidth=0, legend=False, hue="series", style="series",
        palette={name: look.color for name, look in looks.items()},
        markers={name: look.marker for name, look in looks.items()},
    )  # fmt: skip
    if "unstable" in points:
        crossed = points[points["unstable"] == 1]
        axes.scatter(crossed["value"], crossed[value], s=26, marker="x", color="black", linewidth=0.7, zorder=3)
    axes.margins(0.08)
    whole_numbers(axes.xaxis)
    axes.set_ylabel(axis_label(value))


def _settings(runs: Frame, keys: list[str]) -> list[Frame]:
    """The runs of each setting, and of each learning rate that it was given."""
    from lorabench.report.results import grouped

    return [rows for _, rows in grouped(runs, keys)]


def _correlations(points: Frame, keys: list[str], value: str) -> str:
    """Spearman's ρ over settings, and that without unstable runs, where there are any and settings enough."""
    from lorabench.report.aggregate import unstable

    stable = points.drop(index=unstable(points))
    found, without = _correlation(points, keys, value), _correlation(stable, keys, value)
    return f"{found}\nstable {without}" if without and len(stable) < len(points) else found


def _correlation(points: Frame, keys: list[str], value: str) -> str:
    from scipy import stats

    means = [rows[["value", value]].mean() for rows in _settings(points, keys)]
    counts, values = [mean["value"] for mean in means], [mean[value] for mean in means]
    if len(means) < FEWEST or len({*counts}) == 1 or len({*values}) == 1:
        return ""
    rho, p = stats.spearmanr(counts, values)
    return f"ρ = {rho:.2f} ({'p < 0.001' if p < 0.001 else f'p = {p:.2g}'})".replace("-", "−")
