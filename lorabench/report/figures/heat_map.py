"""A metric of ΔW in every layer: kinds of modules by blocks of the model, a panel a setting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.spec.figure import Figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as MatplotlibFigure


@dataclass(frozen=True, kw_only=True)
class HeatMap(Figure):
    """A row of panels a metric, which share its colours; numbers stand in the cells where all of them have room."""

    section: ClassVar[str] = "spectra"
    intervals: ClassVar[bool] = False
    most: ClassVar[int] = 4

    value: str | tuple[str, ...] = ("spectrum.relative_norm", "spectrum.effective_rank_entropy")
    """The metrics, such as `spectrum.rank_90` or `alignment.amplification`."""
    kinds: tuple[str, ...] = ()
    """Kinds of layers, such as `q_proj` (empty: all)."""

    @property
    def measures(self) -> list[str]:
        return [self.value] if isinstance(self.value, str) else list(self.value)

    def draw(self, results: Any) -> MatplotlibFigure | None:
        from lorabench.report import drawing
        from lorabench.report.figures._heat import cell_room, draw_bar, draw_table, fitting, spanning
        from lorabench.report.labels import capitalized
        from lorabench.report.update_metrics import axis_label, ordered_kinds

        maps = {value: found for value in self.measures if (found := self._tables(results, value))}
        if not maps:
            return None
        drawn = [table for found in maps.values() for table in found.values()]
        titles = list(dict.fromkeys(title for found in maps.values() for title in found))
        kinds = ordered_kinds(kind for table in drawn for kind in table.index)
        depths = sorted({depth for table in drawn for depth in table.columns})
        height = 0.5 + 0.17 * len(kinds)
        with drawing.style("white"):
            names = [(value, title) for value in maps for title in titles]
            grid = drawing.facets(map(" ".join, names), self.width, height=height, columns=len(titles))
            panels = dict(zip(names, grid.axes.flat, strict=True))
            for (value, title), axes in panels.items():
                first = value == names[0][0] or grid.figure.get_figwidth() == drawing.COLUMN_INCHES
                axes.set_title(drawing.wrapped(title, 88 // len(titles)) if first else "")
            for value, found in maps.items():
                whole = [found[title].reindex(index=kinds, columns=depths) for title in titles if title in found]
                colors = spanning([table.to_numpy(dtype=float) for table in whole])
                texts = dict(zip(found, fitting(whole, cell_room(grid, height)), strict=True))
                for title in titles:
                    table = found.get(title, whole[0].iloc[:0]).reindex(index=kinds, columns=depths)
                    draw_table(panels[value, title], table, colors, texts.get(title))
                label = drawing.wrapped(capitalized(axis_label(value)), int(14 * height))
                draw_bar([panels[value, title] for title in titles], colors, label, aspect=14)
            grid.set_axis_labels("Block", "Module")
        return grid.figure

    def _tables(self, results: Any, value: str) -> dict[str, pd.DataFrame]:
        """Title -> the mean over seeds, kinds by depths, of the settings that are shown."""
        from lorabench.report.figures._curves import SERIES, settings
        from lorabench.report.results import selected
        from lorabench.report.update_metrics import metric_rows, per_run

        rows = metric_rows(results, value, selected(results).done, self.kinds)
        if rows.empty:
            return {}
        found, _ = settings(results, per_run(results, rows, ["kind", "depth"]), self.most)
        return {str(label): seed_means(chunk) for label, chunk in found.groupby(SERIES, sort=False)}

    def caption(self) -> str:
        return (
            "Each layer's ΔW by block of the model (0 next to the input) and kind of module, the mean over seeds. "
            "Hatched: not trained. Colours are logarithmic where values span more than a factor of 20."
        )


EXAMPLE = HeatMap()


def seed_means(rows: pd.DataFrame) -> pd.DataFrame:
    """Kinds by depths: runs of one seed are averaged first."""
    by_seed = rows.groupby(["kind", "depth", "seed"])["value"].mean()
    return by_seed.groupby(["kind", "depth"]).mean().unstack("depth")
