"""A metric of ΔW against depth: how it changes from the model's input to its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.figure import Figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

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

    @property
    def most(self) -> int:  # type: ignore[override]
        return MAX_PANELS if self.lines == "kind" else MAX_LINES

    def draw(self, results: Any) -> MatplotlibFigure | None:
        from lorabench.report import drawing
        from lorabench.report.aggregate import bounds
        from lorabench.report.figures._curves import SERIES, draw_lines, handles, has_null, settings
        from lorabench.report.labels import capitalized
        from lorabench.report.results import selected
        from lorabench.report.update_metrics import axis_label, metric_rows, ordered_kinds, per_run

        rows = metric_rows(results, self.value, selected(results).done)
        if rows.empty:
            return None
        found, looks = settings(results, per_run(results, rows, ["kind", "depth"]), self.most)
        is_kind = self.lines == "kind"
        kinds = [kind for kind in ordered_kinds(rows["kind"]) if kind in (self.kinds or (kind,))]
        kinds = kinds if is_kind or self.kinds else kinds[:MAX_PANELS]
        found = found[found["kind"].isin(kinds)]
        if found.empty:
            return None
        panel, line = (SERIES, "kind") if is_kind else ("kind", SERIES)
        titles = [title for title in (looks if is_kind else kinds) if (found[panel] == title).any()]
        looks = drawing.looks(kinds) if is_kind else looks
        within = bounds(self.value)
        with drawing.style():
            grid = drawing.facets(titles, self.width)
            for title, axes in grid.axes_dict.items():
                chunk = found[found[panel] == title]
                draw_lines(axes, chunk.assign(**{SERIES: chunk[line]}), looks, "depth", bars=APART, within=within)
            drawing.limit(list(grid.axes.flat))
            drawing.whole_numbers(axes.xaxis, 8)
            grid.set_axis_labels("Block", drawing.wrapped(capitalized(axis_label(self.value)), 32))
            null = drawing.null_handle("random") if has_null(found) else {}
            drawing.legend_below(grid.figure, handles(looks) | null)
        return grid.figure

    def caption(self) -> str:
        from lorabench.report.labels import capitalized
        from lorabench.report.update_metrics import axis_label

        lines = "a line a kind of module" if self.lines == "kind" else "a panel a kind of module"
        return (
            f"{capitalized(axis_label(self.value))} against depth (block 0 is next to the input), {lines}: means over "
            "seeds. Dashed, where the metric has one: a random update, or random directions, of the same shapes and "
            "norms."
        )


EXAMPLE = DepthProfile()
