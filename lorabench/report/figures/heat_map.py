"""A metric of ΔW in every layer: kinds of modules by blocks of the model, a panel a setting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.report.update_metrics import axis_label, metric_rows, ordered_kinds, per_run
from lorabench.spec.figure import Canvas, Figure, Frame


@dataclass(frozen=True, kw_only=True)
class HeatMap(Figure):
    """A row of panels a metric, which share its colours; numbers stand in the cells where all of them have room."""

    section: ClassVar[str] = "spectra"
    needs: ClassVar[str] = "runs with a ΔW, and the metric that it asks for"
    intervals: ClassVar[bool] = False
    most: ClassVar[int] = 4

    value: str | tuple[str, ...] = ("spectrum.relative_norm", "spectrum.effective_rank_entropy")
    """The metrics, such as `spectrum.rank_90` or `alignment.amplification`."""
    kinds: tuple[str, ...] = ()
    """Kinds of layers, such as `q_proj` (empty: all)."""

    def draw(self, results: Any) -> Canvas | None:
        from lorabench.report import drawing
        from lorabench.report.figures._heat import draw_tables, spanning

        maps = {value: found for value in self.measures if (found := self._tables(results, value))}
        if not maps:
            return None
        drawn = [table for found in maps.values() for table in found.values()]
        titles = list(dict.fromkeys(title for found in maps.values() for title in found))
        kinds = ordered_kinds(kind for table in drawn for kind in table.index)
        depths = sorted({depth for table in drawn for depth in table.columns})
        height = 0.5 + 0.17 * len(kinds)
        names = [f"{value} {title}" for value in maps for title in titles]
        with drawing.facets(names, self.width, height=height, columns=len(titles), theme="white") as grid:
            is_narrow = drawing.inches(grid.figure)[0] == drawing.COLUMN_INCHES
            for row, (value, found) in enumerate(maps.items()):
                panels = grid.axes.flat[row * len(titles) : (row + 1) * len(titles)]
                whole = [found.get(title, drawn[0][:0]).reindex(index=kinds, columns=depths) for title in titles]
                label = drawing.wrapped(axis_label(value), int(14 * height))
                draw_tables(panels, whole, spanning(list(found.values())), label, aspect=14)
                for title, axes in zip(titles, panels, strict=True):
                    axes.set_title(title if row == 0 or is_narrow else "")
            grid.set_axis_labels("Block", "Module")
        return grid.figure

    def _tables(self, results: Any, value: str) -> dict[str, Frame]:
        """Title -> the mean over seeds, kinds by depths, of the settings that are shown."""
        from lorabench.report.figures._curves import SERIES, settings

        rows = metric_rows(results, value, kinds=self.kinds)
        if rows.empty:
            return {}
        found, _ = settings(results, per_run(results, rows, ["kind", "depth"]), self.most)
        by_seed = found.groupby([SERIES, "kind", "depth", "seed"], sort=False)["value"].mean()
        means = by_seed.groupby([SERIES, "kind", "depth"], sort=False).mean().unstack("depth")
        return {str(title): means.loc[title] for title in found[SERIES].unique()}

    def caption(self) -> str:
        return (
            "Each layer's ΔW by block of the model (0 next to the input) and kind of module, the mean over seeds. "
            "Hatched: not trained. Colours are logarithmic where values span more than a factor of 20."
        )


EXAMPLE = HeatMap()
