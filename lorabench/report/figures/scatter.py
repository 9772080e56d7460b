"""Any two measures or metrics against each other, a point a setting, with Spearman's ρ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.report.labels import key_label, series_label, value_label
from lorabench.report.update_metrics import RANK, axis_label
from lorabench.spec.figure import Canvas, Figure, Frame
from lorabench.store.record import Status

GREY = "#B5B5B5"


@dataclass(frozen=True, kw_only=True)
class Scatter(Figure):
    """A look a setting; its learning rates are points of their own. With `along` a curve a setting."""

    most: ClassVar[int] = 8

    x: str = "kl_task"
    """A measure of runs, or a metric of ΔW such as `spectrum.rank_90` (the mean over layers)."""
    y: str = "forgetting"
    """Another."""
    along: str | None = None
    """A swept key whose values a line joins: `steps`, to see what training moves while it gets longer. Of each value
    the selected learning rate alone, as in tables."""

    @property
    def measures(self) -> list[str]:
        return [] if (self.x, self.y) == (Scatter.x, Scatter.y) else [self.x, self.y]

    def draw(self, results: Any) -> Canvas | None:
        import seaborn as sns

        from lorabench.report import drawing
        from lorabench.report.correlation import spearman
        from lorabench.report.figures._curves import draw_points

        points, looks = (self._curves if self.along else self._points)(results)
        if len(points) < 2:
            return None
        with drawing.facets([""], self.width, height=2.6) as grid:
            axes = grid.axes.flat[0]
            draw_points(axes, points)
            for _, curve in points.groupby("curve", sort=False) if self.along else ():
                sns.lineplot(curve, x="x", y="y", ax=axes, color=curve["color"].iloc[0], sort=False, estimator=None)
            for which in "xy":
                drawing.limit([axes], which)
            grid.set_axis_labels(axis_label(self.x), axis_label(self.y))
            if not self.along:
                axes.set_title(str(spearman([*points["x"]], [*points["y"]]) or ""))
            drawing.place_labels(axes, points)
            drawing.legend_below(grid.figure, looks, lines=bool(self.along))
        return grid.figure

    def caption(self) -> str:
        if self.along:
            key = key_label(self.along)
            return (
                f"Two measures against each other over {key}: a curve a setting, a point a value of {key}, the mean "
                f"over seeds in both directions. The numbers at the ends of a curve are its {key}."
            )
        return (
            "Two measures against each other, one point a setting and learning rate, selected or not: the mean over "
            "seeds in both directions. ρ: Spearman's rank correlation over these points with its 95% interval "
            "(Fisher's z with the variance of Bonett and Wright 2000); 0 by chance. Seeds of one setting are no "
            "evidence of their own, and no cause is told."
        )

    def notes(self, results: Any) -> list[str]:
        return ["The number beside a point is its rank."] if RANK in results.settings and not self.along else []

    def _points(self, results: Any) -> tuple[Frame, dict[str, Any]]:
        """A row a setting and learning rate, and the looks of the settings that there is room for in the legend."""
        import pandas as pd

        from lorabench.report import drawing
        from lorabench.report.figures._curves import measured
        from lorabench.report.results import grouped

        runs = drawing.finite(drawing.finite(results.runs[results.runs["status"] == Status.DONE], self.x), self.y)
        look, rows = drawing.setting_looks(results), []
        looks: dict[str, Any] = {}
        families = [key for key in results.settings if key != RANK]
        for values, chunk in grouped(runs, [key for key in results.keys if key != "seed"]):
            own = {key: chunk.iloc[0][key] for key in results.settings}
            family = series_label(families, [own[key] for key in families])
            if family not in looks and len(looks) < self.most:
                looks[family] = look({key: own[key] for key in families})
            is_named, rank = family in looks, own.get(RANK)
            about = {
                "color": look(own).color if is_named else GREY,
                "marker": look(own).marker if is_named else "o",
                "text": "" if rank is None or rank != rank else value_label(int(rank)),
                "name": series_label([key for key in results.keys if key != "seed"], values),
            }
            rows.append(about | measured(chunk, self.x, "x") | measured(chunk, self.y))
        if any(row["color"] == GREY for row in rows):
            looks["other settings"] = drawing.Look(GREY, "o")
        return pd.DataFrame(rows), looks

    def _curves(self, results: Any) -> tuple[Frame, dict[str, Any]]:
        """A row a setting and value of `along`, in its order; the numbers of the ends alone are written."""
        import pandas as pd

        from lorabench.report import drawing
        from lorabench.report.figures._curves import measured
        from lorabench.report.results import grouped, ordinal

        along = self.along or ""
        if along not in results.settings:
            return pd.DataFrame(), {}
        runs = drawing.finite(drawing.finite(results.selection.done, self.x), self.y)
        look, rows = drawing.setting_looks(results), []
        looks: dict[str, Any] = {}
        keys = [key for key in results.settings if key != along]
        for values, chunk in grouped(runs, keys)[: self.most]:
            parts = sorted(grouped(chunk, [along]), key=lambda part: ordinal(part[0][0]))
            curve, own = (
                series_label(keys, values),
                look({**dict(zip(keys, values, strict=True)), along: parts[0][0][0]}),
            )
            looks[curve] = own
            for place, ((value,), part) in enumerate(parts):
                about = {"curve": curve, "color": own.color, "marker": own.marker}
                about["text"] = value_label(value) if place in (0, len(parts) - 1) else ""
                about["name"] = series_label([*keys, along], [*values, value])
                rows.append(about | measured(part, self.x, "x") | measured(part, self.y))
        return pd.DataFrame(rows), looks


EXAMPLE = Scatter()
