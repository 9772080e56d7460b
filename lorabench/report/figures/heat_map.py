"""A metric of ΔW in every layer: kinds of modules by blocks of the model, a panel a setting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.spec.figure import Figure

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure as MatplotlibFigure

MAX_PANELS = 4
FONT_POINTS = 5.5


@dataclass(frozen=True, kw_only=True)
class HeatMap(Figure):
    """A row of panels a metric, which share its colours; numbers stand in the cells where all of them have room."""

    section: ClassVar[str] = "spectra"

    value: str | tuple[str, ...] = ("spectrum.relative_norm", "spectrum.effective_rank_entropy")
    """The metrics, such as `spectrum.rank_90` or `alignment.amplification`."""
    kinds: tuple[str, ...] = ()
    """Kinds of layers, such as `q_proj` (empty: all)."""

    @property
    def measures(self) -> list[str]:
        return [self.value] if isinstance(self.value, str) else list(self.value)

    def draw(self, results: Any) -> MatplotlibFigure | None:
        from lorabench.report import drawing
        from lorabench.report.labels import capitalized
        from lorabench.report.update_metrics import axis_label, ordered_kinds

        maps = {value: found for value in self.measures if (found := _tables(results, value, self.kinds))}
        if not maps:
            return None
        drawn = [table for found in maps.values() for table in found.values()]
        titles = list(dict.fromkeys(title for found in maps.values() for title in found))
        kinds = ordered_kinds(kind for table in drawn for kind in table.index)
        depths = sorted({depth for table in drawn for depth in table.columns})
        with drawing.style():
            drawing.plt.rcParams["axes.grid"] = False
            height = 0.5 + 0.17 * len(kinds)
            figure, grid = drawing.new_figure(len(maps), len(titles), height=height, sharex=True, sharey=True)
            for line, (value, found) in zip(grid, maps.items(), strict=True):
                whole = {title: found[title].reindex(index=kinds, columns=depths) for title in titles if title in found}
                colors = _colors([table.to_numpy(dtype=float) for table in whole.values()])
                for axes, title in zip(line, titles, strict=True):
                    _map(axes, whole.get(title), kinds, depths, colors)
                label = drawing.wrapped(capitalized(axis_label(value)), int(14 * height))
                bar = figure.colorbar(colors, ax=line, label=label, pad=0.01, aspect=14)
                if bar.ax.get_yscale() == "log":
                    drawing.plain_logarithmic(bar.ax.yaxis)
            for axes, title in zip(grid[0], titles, strict=True):
                axes.set_title(drawing.wrapped(title, 88 // len(titles)))
            for axes in grid[-1]:
                axes.set_xlabel("Block")
            for axes in grid[:, 0]:
                axes.set_ylabel("Module")
            _write_numbers(grid)
        return figure

    def caption(self) -> str:
        from lorabench.report.update_metrics import THINNED

        return (
            "Each layer's ΔW by block of the model (0 next to the input) and kind of module, the mean over seeds; "
            "settings at their own best learning rate. "
            "Hatched: not trained. Colours are logarithmic where values span more than a factor of 20. " + THINNED
        )


EXAMPLE = HeatMap()


def _tables(results: Any, value: str, kinds: tuple[str, ...]) -> dict[str, pd.DataFrame]:
    """Title -> the mean over seeds, kinds by depths, of the settings that are shown."""
    from lorabench.report.results import selected
    from lorabench.report.update_metrics import by_setting, metric_rows, per_run, shown_settings

    done = selected(results).done
    rows = metric_rows(results, value, done)
    if kinds and len(rows):
        rows = rows[rows["kind"].isin(kinds)]
    if rows.empty:
        return {}
    found = per_run(results, rows, ["kind", "depth"])
    settings = shown_settings(results, found, MAX_PANELS)
    return {label: seed_means(chunk) for label, chunk in by_setting(results, found, settings)}


def seed_means(rows: pd.DataFrame) -> pd.DataFrame:
    """Kinds by depths: runs of one seed are averaged first."""
    by_seed = rows.groupby(["kind", "depth", "seed"])["value"].mean()
    return by_seed.groupby(["kind", "depth"]).mean().unstack("depth")


def _colors(tables: list[np.ndarray]) -> ScalarMappable:
    """Diverging around 0 where values have both signs; else sequential, logarithmic where they span far."""
    import numpy as np
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize

    from lorabench.report.drawing import LOG_FACTOR

    low, high = min(map(np.nanmin, tables)), max(map(np.nanmax, tables))
    if low < 0 < high:
        most = max(-low, high)
        return ScalarMappable(Normalize(-most, most), "RdBu_r")
    norm = LogNorm if low > 0 and high > LOG_FACTOR * low else Normalize
    return ScalarMappable(norm(low, high if high > low else low + (abs(low) or 1.0)), "viridis")


def _map(axes: Axes, table: pd.DataFrame | None, kinds: list[str], depths: list[int], colors: ScalarMappable) -> None:
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    from lorabench.report.drawing import plt

    size = (len(depths), len(kinds))
    axes.add_patch(plt.Rectangle((-0.5, -0.5), *size, fill=False, hatch="/////", edgecolor="#C4C4C4", linewidth=0))
    shown = np.full(size[::-1], np.nan) if table is None else table.to_numpy(dtype=float)
    image = axes.imshow(np.ma.masked_invalid(shown), cmap=colors.cmap, aspect="auto", zorder=2)
    image.set_norm(colors.norm)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(lambda place, _: str(depths[int(place)]) if 0 <= place < len(depths) else "")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _write_numbers(grid: np.ndarray) -> None:
    """Two digits in each cell, where the widest fits into it in every panel."""
    import numpy as np

    figure = grid[0, 0].figure
    figure.canvas.draw()
    for line in grid:
        cells = [
            (axes, i, j, float(value), axes.images[0].to_rgba(value))
            for axes in line
            for (i, j), value in np.ma.ndenumerate(axes.images[0].get_array())
        ]
        texts = [_short(value) for *_, value, _ in cells]
        columns = line[0].images[0].get_size()[1]
        room = min(axes.get_window_extent().width for axes in line) / figure.dpi * 72 / columns
        if not texts or max(map(len, texts)) * 0.62 * FONT_POINTS + 2 > room:
            continue
        for (axes, i, j, _, rgba), text in zip(cells, texts, strict=True):
            light = np.dot(rgba[:3], (0.299, 0.587, 0.114)) > 0.55
            color = "black" if light else "white"
            axes.text(j, i, text, ha="center", va="center", color=color, fontsize=FONT_POINTS, zorder=3)


def _short(value: float) -> str:
    """`0.083`, `3.0`, `110`: two significant digits."""
    import math

    from lorabench.report.aggregate import number
    from lorabench.report.labels import value_label

    if value and not 1e-3 <= abs(value) < 1e4:
        return value_label(float(f"{value:.1e}")).replace("-", "−")
    digits = 1 - math.floor(math.log10(abs(value))) if value else 0
    return number(value, digits).replace(",", "")
