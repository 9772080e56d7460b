"""Memory and throughput against quality: what each setting costs for what it reaches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.report.labels import measure, series_label, value_label
from lorabench.report.update_metrics import RANK, axis_label
from lorabench.spec.figure import Axes, Canvas, Figure, Frame

FEW = 8
"""Settings that colours and markers alone tell apart."""


@dataclass(frozen=True, kw_only=True)
class CostQuality(Figure):
    """A point a setting; colour and marker tell the method and its other keys, shade and number the rank.

    More than a few settings are numbered instead.
    """

    section: ClassVar[str] = "cost"
    needs: ClassVar[str] = "runs that are done, with the costs that it asks for"

    costs: tuple[str, ...] = ("peak_gib", "tokens_per_second")
    """The measures of the panels' x axes."""
    value: str | None = None
    """The measure of the y axis (None: validation loss or accuracy, whichever the sweep selects by)."""

    def draw(self, results: Any) -> Canvas | None:
        from lorabench.report import drawing
        from lorabench.report.figures._curves import draw_points

        value = self._value(results)
        points = _points(results, drawing.finite(results.selection.done, value), self._costs(results), value)
        if points.empty:
            return None
        with drawing.facets(points["cost"].unique(), self.width, height=2.6, sharex=False) as grid:
            for cost, axes in grid.axes_dict.items():
                draw_points(axes, points[points["cost"] == cost])
                _draw_front(axes, points[points["cost"] == cost], cost, value)
                drawing.limit([axes], "x")
                if axes.get_xscale() == "linear":  # else numbers of many digits run into one another
                    axes.locator_params(axis="x", nbins=5)
                more = measure(cost).higher_is_better
                better = "" if more is None else f"\n({'more' if more else 'less'} is better)"
                axes.set(xlabel=axis_label(cost) + better, title="")
            drawing.limit(list(grid.axes.flat), logs=False)
            grid.set_ylabels(axis_label(value))
            for cost, axes in grid.axes_dict.items():
                drawing.place_labels(axes, points[points["cost"] == cost].assign(color=points["ink"]))
            drawing.legend_below(grid.figure, dict(zip(points["label"], points["look"], strict=True)), lines=False)
        return grid.figure

    def _costs(self, results: Any) -> tuple[str, ...]:
        """Images per second where no run has read tokens."""
        rates = {"tokens_per_second": "images_per_second"}
        return tuple(cost if cost in results.runs else rates.get(cost, cost) for cost in self.costs)

    def _value(self, results: Any) -> str:
        return self.value or f"valid_{results.quality}"

    def caption(self) -> str:
        return (
            "Quality against memory and throughput, one point a setting, the mean over seeds in both directions. Grey: "
            "the settings that no other beats in both (the Pareto front)."
        )

    def notes(self, results: Any) -> list[str]:
        from lorabench.report import drawing

        if len(_families(results, drawing.finite(results.selection.done, self._value(results)))) > FEW:
            return ["The number beside a point is that of its setting in the legend."]
        return ["The number beside a point is its rank."] if RANK in results.settings else []


EXAMPLE = CostQuality()


def pareto_front(points: Sequence[tuple[float, float]], more: tuple[bool, bool]) -> list[int]:
    """Places of the points than which no other is at least as good in both and better in one, from the best x on.

    `more`: whether more is better, of x and of y.
    """
    signs = [-1 if better else 1 for better in more]
    costs = [tuple(sign * value for sign, value in zip(signs, point, strict=True)) for point in points]
    order = sorted(range(len(costs)), key=costs.__getitem__)
    best = math.inf
    found: list[int] = []
    for place in order:
        if costs[place][1] < best or (found and costs[place] == costs[found[-1]]):
            best = costs[place][1]
            found.append(place)
    return found


def _draw_front(axes: Axes, points: Frame, cost: str, value: str) -> None:
    """A line through the settings that no other beats in both, where both have a better side."""
    from matplotlib.collections import LineCollection

    from lorabench.report import drawing

    more = measure(cost).higher_is_better, measure(value).higher_is_better
    if None not in more:
        pairs = [*points[["x", "y"]].itertuples(index=False, name=None)]
        front = [pairs[place] for place in pareto_front(pairs, (bool(more[0]), bool(more[1])))]
        axes.add_collection(LineCollection([front], colors=drawing.REFERENCE, linewidths=0.8, zorder=1))


def _families(results: Any, runs: Frame) -> list[Any]:
    """The settings, whatever their rank."""
    from lorabench.report.results import grouped

    return list(grouped(runs, [key for key in results.settings if key != RANK]))


def _points(results: Any, runs: Frame, costs: tuple[str, ...], value: str) -> Frame:
    """A row a cost and setting."""
    import pandas as pd

    from lorabench.report import drawing
    from lorabench.report.figures._curves import measured
    from lorabench.report.results import grouped

    look, rows = drawing.setting_looks(results), []
    keys = [key for key in results.settings if key != RANK]
    is_numbered = len(_families(results, runs)) > FEW
    for number, (values, chunk) in enumerate(grouped(runs, results.settings), 1):
        own = dict(zip(results.settings, values, strict=True))
        family, rank = {key: own[key] for key in keys}, own.get(RANK)
        row: dict[str, Any] = {"color": look(own).color, "marker": look(own).marker, "ink": look(family).color}
        if is_numbered:
            name = series_label(results.settings, values)
            row |= {"label": f"{number}  {name}", "text": f"{number}", "look": look(own)}
        else:
            row |= {"label": series_label(keys, [*family.values()]), "look": look(family)}
            row |= {"text": "" if rank is None else value_label(rank)}
        row["name"] = series_label(results.settings, values)
        both = {cost: drawing.finite(chunk, cost) for cost in costs}
        rows += [
            {"cost": cost} | row | measured(found, cost, "x") | measured(chunk, value)
            for cost, found in both.items()
            if len(found)
        ]
    return pd.DataFrame(sorted(rows, key=lambda row: costs.index(row["cost"])))
