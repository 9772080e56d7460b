"""Memory and throughput against quality: what each setting costs for what it reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.spec.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

RANK = "method.rank"
FEW = 8
"""Settings that colours and markers alone tell apart."""


@dataclass(frozen=True, kw_only=True)
class CostQuality(Figure):
    """A point a setting; colour and marker tell the method and its other keys, the number beside it the rank.

    More than a few settings are numbered instead.
    """

    section: ClassVar[str] = "cost"

    costs: tuple[str, ...] = ("peak_gib", "tokens_per_second")
    """The measures of the panels' x axes."""
    value: str | None = None
    """The measure of the y axis (None: validation loss or accuracy, whichever the sweep selects by)."""

    @property
    def measures(self) -> list[str]:
        return [*self.costs, *([self.value] if self.value else [])]

    def draw(self, results: Any) -> MatplotlibFigure | None:
        from lorabench.report import drawing
        from lorabench.report.labels import capitalized, measure, with_unit
        from lorabench.report.results import selected
        from lorabench.report.tables import quality

        value = self.value or f"valid_{quality(results)}"
        runs = drawing.finite(selected(results).done, value)
        costs = [cost for cost in self.costs if len(drawing.finite(runs, cost))]
        if not costs:
            return None
        with drawing.style():
            columns = drawing.panel_columns(len(costs))
            rows = -(-len(costs) // columns)
            figure, grid = drawing.new_figure(rows, columns, sharey=True, height=2.6)
            drawing.lowest(grid, len(costs))
            handles: dict[str, Any] = {}
            for axes, cost in zip(grid.flat, costs, strict=False):
                handles |= _panel(axes, results, drawing.finite(runs, cost), (cost, value))
                more = measure(cost).higher_is_better
                better = "" if more is None else f"\n({'more' if more else 'less'} is better)"
                axes.set_xlabel(capitalized(with_unit(cost)) + better)
            for axes in grid[:, 0]:
                axes.set_ylabel(capitalized(with_unit(value)))
            drawing.legend_below(figure, list(handles.values()), list(handles))
        return figure

    def caption(self) -> str:
        return (
            "Quality against memory and throughput, one point a setting at its own best learning rate, with 95% "
            "Student-t intervals over seeds in both directions (hollow: a single seed). The number beside a point is "
            "its rank, or its number in the legend."
        )


EXAMPLE = CostQuality()


def _panel(axes: Axes, results: Any, runs: Any, names: tuple[str, str]) -> dict[str, Any]:
    """Points with their intervals; label -> handle."""
    from lorabench.report import drawing
    from lorabench.report.aggregate import cell
    from lorabench.report.labels import series_label, value_label
    from lorabench.report.results import grouped

    keys = [key for key in results.settings if key != RANK]
    looks = drawing.looks(values for values, _ in grouped(runs, keys))
    handles: dict[str, Any] = {}
    points, texts, colors = [], [], []
    groups = grouped(runs, results.settings)
    numbers = {values: f"{i}" for i, (values, _) in enumerate(groups, 1)} if len(looks) > FEW else {}
    for values, chunk in groups:
        x, y = (cell(chunk, name) for name in names)
        at = dict(zip(results.settings, values, strict=True))
        look = looks[tuple(at[key] for key in keys)]
        handle = axes.errorbar(
            x.center, y.center, xerr=x.half or 0.0, yerr=y.half or 0.0, color=look.color, linestyle="none",
            marker=look.marker, markerfacecolor="white" if y.half is None else look.color, elinewidth=0.8,
        )  # fmt: skip
        label = series_label(keys, [at[key] for key in keys])
        handles.setdefault(f"{numbers[values]}  {label}" if numbers else label, handle)
        points.append((x, y))
        texts.append(numbers.get(values) or ("" if at.get(RANK) is None else value_label(at[RANK])))
        colors.append(look.color)
    axes.margins(0.1)
    drawing.limit_x(axes, [x for x, _ in points])
    drawing.limit_y(axes, [y for _, y in points])
    drawing.place_labels(axes, points, texts, colors)
    return handles
