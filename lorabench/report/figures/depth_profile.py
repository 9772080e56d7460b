"""A metric of ΔW against depth: how it changes from the model's input to its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

    from lorabench.report.figures._curves import Curve

MAX_PANELS, MAX_LINES = 4, 8
APART = 0.07
"""Blocks between neighbouring lines, so that no bar hides another."""


@dataclass(frozen=True, kw_only=True)
class DepthProfile(Figure):
    """A line a kind of module and a panel a setting, or the other way round."""

    section: ClassVar[str] = "spectra"

    value: str = "spectrum.relative_norm"
    """The metric, such as `spectrum.effective_rank_entropy` or `alignment.amplification`."""
    lines: Literal["kind", "setting"] = "kind"
    """What the lines are; the panels are the other."""
    kinds: tuple[str, ...] = ()
    """Kinds of layers, such as `q_proj` (empty: all; of panels the first four)."""

    @property
    def measures(self) -> list[str]:
        return [self.value]

    def draw(self, results: Any) -> MatplotlibFigure | None:
        from lorabench.report import drawing
        from lorabench.report.figures._curves import has_null, null_handle
        from lorabench.report.labels import capitalized
        from lorabench.report.update_metrics import axis_label

        panels = self._panels(results)
        if not panels:
            return None
        columns = drawing.panel_columns(len(panels))
        names = dict.fromkeys(name for lines in panels.values() for name in lines)
        looks = drawing.looks(names)
        with drawing.style():
            figure, grid = drawing.new_figure(-(-len(panels) // columns), columns, sharex=True, sharey=True)
            handles: dict[str, Any] = {}
            for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
                handles |= _panel(axes, lines, looks)
                axes.set_title(drawing.wrapped(title, 100 // columns))
            drawn = [line for lines in panels.values() for line in lines.values()]
            _scale(grid[0, 0], drawn)
            for axes in drawing.lowest(grid, len(panels)):
                axes.set_xlabel("Block")
            for axes in grid[:, 0]:
                axes.set_ylabel(drawing.wrapped(capitalized(axis_label(self.value)), 32))
            handles = {name: handles[name] for name in names}
            handles |= null_handle("random") if has_null(drawn) else {}
            drawing.legend_below(figure, list(handles.values()), list(handles))
        return figure

    def _panels(self, results: Any) -> dict[str, dict[str, Curve]]:
        """Panel -> line -> its points over depth."""
        from lorabench.report.figures._curves import curve
        from lorabench.report.results import selected
        from lorabench.report.update_metrics import by_setting, metric_rows, ordered_kinds, per_run, shown_settings

        done = selected(results).done
        rows = metric_rows(results, self.value, done)
        if rows.empty:
            return {}
        found = per_run(results, rows, ["kind", "depth"])
        kinds = [kind for kind in ordered_kinds(rows["kind"]) if kind in (self.kinds or (kind,))]
        is_kind = self.lines == "kind"
        settings = shown_settings(results, found, MAX_PANELS if is_kind else MAX_LINES)
        panels: dict[str, dict[str, Curve]] = {}
        for label, chunk in by_setting(results, found, settings):
            for kind in kinds if is_kind or self.kinds else kinds[:MAX_PANELS]:
                line = curve(chunk[chunk["kind"] == kind], "depth")
                panel, name = (label, kind) if is_kind else (kind, label)
                if line:
                    panels.setdefault(panel, {})[name] = line
        return panels

    def caption(self) -> str:
        from lorabench.report.labels import capitalized
        from lorabench.report.update_metrics import THINNED, axis_label

        lines = "a line a kind of module" if self.lines == "kind" else "a panel a kind of module"
        return (
            f"{capitalized(axis_label(self.value))} against depth (block 0 is next to the input), {lines}: means over "
            "seeds with 95% Student-t intervals (hollow: a single seed), settings at their own best learning rate. "
            "Dashed, where the metric has one: a random update, or random directions, of the same shapes and norms. "
            + THINNED
        )


EXAMPLE = DepthProfile()


def _panel(axes: Axes, lines: dict[str, Curve], looks: dict[str, Any]) -> dict[str, Any]:
    from matplotlib.ticker import MaxNLocator

    from lorabench.report.figures._curves import draw_curve

    middle = (len(looks) - 1) / 2
    shifts = {name: APART * (position - middle) for position, name in enumerate(looks)}
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return {name: draw_curve(axes, line, looks[name], shift=shifts[name]) for name, line in lines.items()}


def _scale(axes: Axes, lines: list[Curve]) -> None:
    """Limits of means, intervals and nulls; a log axis where the means span far."""
    from lorabench.report import drawing

    cells = [item for line in lines for _, item in line]
    drawing.limit_y(axes, cells)
    nulls = [item.null for item in cells if item.null is not None]
    means = [item.center for item in cells]
    if min(means) > 0 and max(means) > drawing.LOG_FACTOR * min(means):
        axes.set_yscale("log")
        axes.set_ylim(min([*means, *nulls]) / 1.3, max([*means, *nulls]) * 1.3)
        drawing.plain_logarithmic(axes.yaxis)
    elif nulls:
        low, high = axes.get_ylim()
        room = 0.04 * (high - low)
        axes.set_ylim(min(low, min(nulls) - room), max(high, max(nulls) + room))
