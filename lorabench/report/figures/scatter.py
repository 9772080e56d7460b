"""Any two measures or metrics against each other, a point a setting, with Spearman's ρ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.report.update_metrics import RANK, axis_label
from lorabench.spec.figure import Canvas, Figure, Frame
from lorabench.store.record import Status

GREY = "#B5B5B5"


@dataclass(frozen=True, kw_only=True)
class Scatter(Figure):
    """A look a setting; its learning rates are points of their own."""

    most: ClassVar[int] = 8

    x: str = "kl_task"
    """A measure of runs, or a metric of ΔW such as `spectrum.rank_90` (the mean over layers)."""
    y: str = "forgetting"
    """Another."""

    @property
    def measures(self) -> list[str]:
        return [] if (self.x, self.y) == (Scatter.x, Scatter.y) else [self.x, self.y]

    def draw(self, results: Any) -> Canvas | None:
        from lorabench.report import drawing
        from lorabench.report.correlation import spearman
        from lorabench.report.figures._curves import draw_points

        points, looks = _points(results, self.x, self.y, self.most)
        if len(points) < 2:
            return None
        with drawing.facets([""], self.width, height=2.6) as grid:
            axes = grid.axes.flat[0]
            draw_points(axes, points)
            for which in "xy":
                drawing.limit([axes], which)
            grid.set_axis_labels(axis_label(self.x), axis_label(self.y))
            axes.set_title(str(spearman([*points["x"]], [*points["y"]]) or ""))
            drawing.place_labels(axes, points)
            drawing.legend_below(grid.figure, looks, lines=False)
        return grid.figure

    def caption(self) -> str:
        return (
            "Two measures against each other, one point a setting and learning rate, selected or not: the mean over "
            "seeds in both directions. ρ: Spearman's rank correlation over these points with its 95% interval "
            "(Fisher's z with the variance of Bonett and Wright 2000); 0 by chance. Seeds of one setting are no "
            "evidence of their own, and no cause is told."
        )

    def notes(self, results: Any) -> list[str]:
        return ["The number beside a point is its rank."] if RANK in results.settings else []


EXAMPLE = Scatter()


def _points(results: Any, x: str, y: str, most: int) -> tuple[Frame, dict[str, Any]]:
    """A row a setting and learning rate, and the looks of the settings that there is room for in the legend."""
    import pandas as pd

    from lorabench.report import drawing
    from lorabench.report.figures._curves import measured
    from lorabench.report.labels import series_label, value_label
    from lorabench.report.results import grouped

    runs = drawing.finite(drawing.finite(results.runs[results.runs["status"] == Status.DONE], x), y)
    look, rows = drawing.setting_looks(results), []
    looks: dict[str, Any] = {}
    families = [key for key in results.settings if key != RANK]
    for values, chunk in grouped(runs, [key for key in results.keys if key != "seed"]):
        own = {key: chunk.iloc[0][key] for key in results.settings}
        family = series_label(families, [own[key] for key in families])
        if family not in looks and len(looks) < most:
            looks[family] = look({key: own[key] for key in families})
        is_named, rank = family in looks, own.get(RANK)
        about = {
            "color": look(own).color if is_named else GREY,
            "marker": look(own).marker if is_named else "o",
            "text": "" if rank is None or rank != rank else value_label(int(rank)),
            "name": series_label([key for key in results.keys if key != "seed"], values),
        }
        rows.append(about | measured(chunk, x, "x") | measured(chunk, y))
    return pd.DataFrame(rows), looks
