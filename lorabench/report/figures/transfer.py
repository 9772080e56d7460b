"""Tasks in sequence: how each does before training and after each task, as a matrix for each setting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

    from lorabench.report.transfer import Transfer

MAX_PANELS = 12


@dataclass(frozen=True, kw_only=True)
class TransferMatrix(Figure):
    """A panel a setting: numbers are means over seeds, colours the change from the untouched base."""

    section: ClassVar[str] = "cost"

    metric: Literal["accuracy", "loss"] = "accuracy"
    """Accuracy (of a language model, the share of tokens predicted right), or the validation loss."""

    def draw(self, results: Any) -> MatplotlibFigure | None:
        from lorabench.report import drawing
        from lorabench.report.labels import measure
        from lorabench.report.results import selected
        from lorabench.report.transfer import transfers

        found = [item for item in transfers(results, selected(results)) if item.name.endswith(self.metric)][:MAX_PANELS]
        if not found:
            return None
        columns = drawing.panel_columns(len(found))
        largest = max(abs(change) for item in found for line in changes(item) for change in line) or 1.0
        with drawing.style():
            drawing.plt.rcParams["axes.grid"] = False
            tallest = max(len(item.cells) for item in found)
            figure, grid = drawing.new_figure(-(-len(found) // columns), columns, height=1.0 + 0.3 * tallest)
            for axes, item in zip(grid.flat, found, strict=False):
                self._draw_panel(axes, item, largest)
                axes.set_title(_title(results, item))
            for axes in drawing.lowest(grid, len(found)):
                axes.set_xlabel("evaluated on")
            for axes in grid[:, 0]:
                axes.set_ylabel("after training on")
            unit = {"%": "points"}.get(measure(found[0].name).unit, measure(found[0].name).unit)
            figure.colorbar(grid[0, 0].images[0], ax=grid, label=f"change from base ({unit})", pad=0.01, aspect=18)
        return figure

    def _draw_panel(self, axes: Axes, item: Transfer, largest: float) -> None:
        from lorabench.report.drawing import plt

        colors = "RdBu" if self.metric == "accuracy" else "RdBu_r"  # blue is better
        axes.imshow(changes(item), vmin=-largest, vmax=largest, cmap=colors, aspect="auto")
        for i, line in enumerate(item.cells):
            for j, (cell, change) in enumerate(zip(line, changes(item)[i], strict=True)):
                color = "white" if abs(change) > 0.6 * largest else "black"
                digits = 1 if self.metric == "accuracy" else 2
                text = "–" if cell.mean is None else f"{cell.mean:.{digits}f}"
                axes.text(j, i, text, ha="center", va="center", color=color, fontsize=7)
        for j in range(len(item.tasks)):
            axes.add_patch(plt.Rectangle((j - 0.5, j + 0.5), 1, 1, fill=False, linewidth=1.2, clip_on=False))
        axes.set_xticks(range(len(item.tasks)), item.tasks, rotation=20, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(item.cells)), item.stages)

    def caption(self) -> str:
        what = "accuracy" if self.metric == "accuracy" else "loss"
        return (
            f"Validation {what} on each task (columns) before training and after each task of the sequence (rows), the "
            "mean over seeds; colours: the change from the untouched base, blue where it is better. Framed: the task "
            "just trained; below the frames is what training on later tasks does to earlier ones, above them what "
            "earlier tasks give later ones (Lopez-Paz and Ranzato 2017)."
        )


def _title(results: Any, item: Transfer) -> str:
    """The setting without its tasks, which the axes tell."""
    import textwrap

    from lorabench.report.labels import series_label

    pairs = [pair for pair in zip(results.settings, item.setting, strict=True) if pair[0] != "tasks"]
    keys, values = zip(*pairs, strict=True)
    return "\n".join(textwrap.wrap(series_label(keys, values), 38))


def changes(item: Transfer) -> list[list[float]]:
    """R[i][j] - R[0][j]."""
    base = [cell.mean or 0.0 for cell in item.cells[0]]
    return [[(cell.mean or 0.0) - start for cell, start in zip(line, base, strict=True)] for line in item.cells]


EXAMPLE = TransferMatrix()
