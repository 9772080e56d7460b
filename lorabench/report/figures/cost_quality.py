"""Memory and throughput against quality: what each setting costs for what it reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.spec.figure import Figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as MatplotlibFigure

RANK = "method.rank"
FEW = 8
"""Settings that colours and markers alone tell apart."""


@dataclass(frozen=True, kw_only=True)
class CostQuality(Figure):
    """A point a setting; colour and marker tell the method and its other keys, shade and number the rank.

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
        from lorabench.report.figures._curves import draw_points
        from lorabench.report.labels import capitalized, measure, with_unit
        from lorabench.report.results import selected
        from lorabench.report.tables import quality

        value = self.value or f"valid_{quality(results)}"
        runs = drawing.finite(selected(results).done, value)
        points = _points(results, runs, [cost for cost in self.costs if len(drawing.finite(runs, cost))], value)
        if points.empty:
            return None
        with drawing.style():
            grid = drawing.facets(points["cost"].unique(), self.width, height=2.6, sharex=False)
            for cost, axes in grid.axes_dict.items():
                draw_points(axes, points[points["cost"] == cost])
                drawing.limit([axes], "x")
                if axes.get_xscale() == "linear":  # else numbers of many digits run into one another
                    axes.locator_params(axis="x", nbins=5)
                more = measure(cost).higher_is_better
                better = "" if more is None else f"\n({'more' if more else 'less'} is better)"
                axes.set(xlabel=capitalized(with_unit(cost)) + better, title="")
            drawing.limit(list(grid.axes.flat), logs=False)
            grid.set_ylabels(capitalized(with_unit(value)))
            for cost, axes in grid.axes_dict.items():
                drawing.place_labels(axes, points[points["cost"] == cost].assign(color=points["ink"]))
            drawing.legend_below(grid.figure, {item.label: item.look.handle_alone for item in points.itertuples()})
        return grid.figure

    def caption(self) -> str:
        return (
            "Quality against memory and throughput, one point a setting, the mean over seeds in both directions. The "
            "number beside a point is its rank, or its number in the legend."
        )


EXAMPLE = CostQuality()


def _points(results: Any, runs: pd.DataFrame, costs: list[str], value: str) -> pd.DataFrame:
    """A row a cost and setting."""
    import pandas as pd

    from lorabench.report import drawing
    from lorabench.report.aggregate import bounds
    from lorabench.report.figures._curves import measured
    from lorabench.report.labels import series_label, value_label
    from lorabench.report.results import grouped

    look = drawing.setting_looks(results)
    keys = [key for key in results.settings if key != RANK]
    is_numbered = len(grouped(runs, keys)) > FEW
    rows = []
    for number, (values, chunk) in enumerate(grouped(runs, results.settings), 1):
        setting = dict(zip(results.settings, values, strict=True))
        label, rank = series_label(keys, [setting[key] for key in keys]), setting.get(RANK)
        own = look(setting)
        row: dict[str, Any] = {"label": f"{number}  {series_label(results.settings, values)}" if is_numbered else label}
        row |= {"text": f"{number}" if is_numbered else "" if rank is None else value_label(rank)}
        family = look({key: setting[key] for key in keys})
        row |= {"color": own.color, "marker": own.marker, "ink": family.color, "look": own if is_numbered else family}
        for cost in costs:
            both = drawing.finite(chunk, cost)
            if len(both):
                at = measured(both, cost, bounds(cost), "x") | measured(both, value, bounds(value))
                rows.append({"cost": cost} | row | at)
    return pd.DataFrame(sorted(rows, key=lambda row: costs.index(row["cost"])))
