"""A metric of ΔW against depth: how it changes from the model's input to its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lorabench.report.update_metrics import NULL, axis_label, metric_rows, ordered_kinds, per_run
from lorabench.spec.figure import Canvas, Figure

MAX_PANELS, MAX_LINES = 4, 8
APART = 0.07
"""Blocks between neighbouring lines, so that no bar hides another."""


@dataclass(frozen=True, kw_only=True)
class DepthProfile(Figure):
    """A line a kind of module and a panel a setting, or the other way round."""

    section: ClassVar[str] = "spectra"
    needs: ClassVar[str] = "runs with a ΔW, in layers of the kinds that it asks for"

    value: str = "spectrum.relative_norm"
    """The metric, such as `spectrum.effective_rank_entropy` or `alignment.amplification`."""
    lines: Literal["kind", "setting"] = "kind"
    """What the lines are; the panels are the other."""
    kinds: tuple[str, ...] = ()
    """Kinds of layers, such as `q_proj` (empty: all; of panels the first four)."""

    @property
    def most(self) -> int:  # type: ignore[override]
        return MAX_PANELS if self.lines == "kind" else MAX_LINES

    def draw(self, results: Any) -> Canvas | None:
        from lorabench.report import drawing
        from lorabench.report.aggregate import bounds
        from lorabench.report.figures._curves import SERIES, draw_lines, settings

        rows = metric_rows(results, self.value)
        kinds = [kind for kind in ordered_kinds(rows.get("kind", ())) if kind in (self.kinds or (kind,))]
        kinds = kinds if self.lines == "kind" or self.kinds else kinds[:MAX_PANELS]
        if not kinds:
            return None
        found, looks = settings(results, per_run(results, rows, ["kind", "depth"]), self.most)
        found = found[found["kind"].isin(kinds)]
        panel, titles = ("kind", kinds) if self.lines == "setting" else (SERIES, list(looks))
        looks = looks if self.lines == "setting" else drawing.looks(kinds)
        with drawing.facets([title for title in titles if (found[panel] == title).any()], self.width) as grid:
            for title, axes in grid.axes_dict.items():
                chunk = found[found[panel] == title]
                chunk = chunk if self.lines == "setting" else chunk.assign(**{SERIES: chunk["kind"]})
                draw_lines(axes, chunk, looks, "depth", apart=APART, within=bounds(self.value))
            drawing.limit(list(grid.axes.flat))
            drawing.whole_numbers(axes.xaxis, 8)
            grid.set_axis_labels("Block", drawing.wrapped(axis_label(self.value), 32))
            drawing.legend_below(grid.figure, looks, "random" if found[NULL].notna().any() else None)
        return grid.figure

    def caption(self) -> str:
        lines = "a line a kind of module" if self.lines == "kind" else "a panel a kind of module"
        return (
            f"{axis_label(self.value)} against depth (block 0 is next to the input), {lines}: means over seeds. "
            "Dashed, where the metric has one: a random update, or random directions, of the same shapes and norms."
        )


EXAMPLE = DepthProfile()
