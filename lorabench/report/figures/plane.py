"""What is learned of the task against what is forgotten, with each run's path W0 + λ ΔW where it was evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.report.update_metrics import axis_label
from lorabench.spec.figure import Axes, Canvas, Figure
from lorabench.store.record import Status

GREY = "#B5B5B5"


@dataclass(frozen=True, kw_only=True)
class Plane(Figure):
    """A point a run, selected or not, a look a setting; the way to it from the untouched base, and beyond."""

    section: ClassVar[str] = "cost"
    needs: ClassVar[str] = "two runs that are done, with what is retained (task.retain)"
    intervals: ClassVar[bool] = False
    most: ClassVar[int] = 8

    value: str = ""
    """The measure of the task, on the y axis (empty: what tables show, on the validation split)."""
    retained: str = "forgetting"
    """That of what is retained, on the x axis."""

    @property
    def measures(self) -> list[str]:
        asked = [self.value] if self.value else []
        return [*asked, *([] if self.retained == Plane.retained else [self.retained])]

    def draw(self, results: Any) -> Canvas | None:
        from lorabench.report import drawing
        from lorabench.report.figures._curves import SERIES, settings
        from lorabench.report.hover import name_points
        from lorabench.report.labels import series_label, shown_factor

        value = self.value or f"valid_{results.quality}"
        runs = drawing.finite(results.runs[results.runs["status"] == Status.DONE], self.retained)
        runs = drawing.finite(runs, value)
        if len(runs) < 2:
            return None
        found, looks = settings(results, runs, self.most)
        names, factors = (self.retained, value), (shown_factor(self.retained), shown_factor(value))
        points = runs[list(names)] * factors
        rest = points.drop(index=found.index)
        keys = [key for key in results.setting_keys if key not in results.settings]
        with drawing.facets([""], self.width, height=2.6 + 0.12 * max(0, len(looks) - 4)) as grid:
            axes = grid.axes.flat[0]
            axes.scatter(rest[names[0]], rest[names[1]], s=9, color=GREY, linewidth=0, zorder=2)
            for label, look in looks.items():
                own = found.index[found[SERIES] == label]
                for run_id in own:
                    _draw_path(axes, results.paths.get(run_id, []), names, factors, look.color)
                x, y = (points.loc[own, name] for name in names)
                axes.scatter(
                    x, y, s=20, color=look.color, marker=look.marker, edgecolor="white", linewidth=0.4, zorder=4
                )
                which = [series_label(keys, [runs.at[run_id, key] for key in keys]) for run_id in own]
                name_points(axes, [", ".join(filter(None, (label, text))) for text in which])
            entries = dict(looks) | _draw_base(axes, runs, value, self.retained, factors[1])
            axes.margins(0.06)
            grid.set_axis_labels(axis_label(self.retained), axis_label(value))
            drawing.legend_below(grid.figure, entries, lines=False)
        return grid.figure

    def caption(self) -> str:
        return (
            "What is learned of the task against what is forgotten, one point a run, whatever its learning rate; grey: "
            "of settings that there is no colour for. Lines, where a run was evaluated there (`lorabench intervene "
            "--update`): its way W0 + λ ΔW from the untouched base, λ = 0, to the run itself, λ = 1, and dotted "
            "beyond; dots mark the λ that were evaluated (Wortsman et al. 2021)."
        )


EXAMPLE = Plane()


def _draw_path(
    axes: Axes, path: list[dict[str, float]], names: tuple[str, str], factors: tuple[float, float], color: str
) -> None:
    """Solid up to the run itself, dotted beyond."""
    known = [point for point in path if all(name in point for name in names)]
    for part, style in ((lambda scale: scale <= 1, "-"), (lambda scale: scale >= 1, ":")):
        own = [[factor * point[name] for name, factor in zip(names, factors, strict=True)]
               for point in known if part(point["lambda"])]  # fmt: skip
        if len(own) > 1:
            x, y = zip(*own, strict=True)
            axes.plot(
                x, y, color=color, linestyle=style, linewidth=0.8, marker=".", markersize=2.5, alpha=0.8, zorder=3
            )


def _draw_base(axes: Axes, runs: Any, value: str, retained: str, factor: float) -> dict[str, Any]:
    """A star where the untouched base is; of several bases each. An entry for the legend."""
    from lorabench.report.drawing import Look

    column = f"base_{value}"
    if retained != Plane.retained or column not in runs or not runs[column].notna().any():
        return {}
    values = factor * runs[column].dropna().round(6).drop_duplicates()
    axes.scatter([0.0] * len(values), values, marker="*", s=45, color="black", linewidth=0, zorder=5)
    return {"untouched base": Look("black", "*")}
