"""Tasks in sequence: how each does before training and after each task, as a matrix for each setting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.figure import Figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

    from lorabench.report.transfer import Transfer

MAX_PANELS = 12


@dataclass(frozen=True, kw_only=True)
class TransferMatrix(Figure):
    """A panel a setting: numbers are means over seeds, colours the change from the untouched base."""

    section: ClassVar[str] = "cost"
    intervals: ClassVar[bool] = False

    metric: Literal["accuracy", "loss"] = "accuracy"
    """Accuracy (of a language model, the share of tokens predicted right), or the validation loss."""

    def draw(self, results: Any) -> MatplotlibFigure | None:
        import pandas as pd

        from lorabench.report import drawing
        from lorabench.report.figures._heat import around_zero, draw_bar, draw_table
        from lorabench.report.labels import distinct, measure
        from lorabench.report.results import selected
        from lorabench.report.transfer import transfers

        found = [item for item in transfers(results, selected(results)) if item.name.endswith(self.metric)][:MAX_PANELS]
        if not found:
            return None
        titled: dict[str, Transfer] = {}
        for item in found:
            titled[distinct(_title(results, item), titled, " ({})")] = item
        largest = max(abs(change) for item in found for line in changes(item) for change in line) or 1.0
        colors = around_zero(largest, "RdBu" if self.metric == "accuracy" else "RdBu_r")  # blue is better
        digits = 1 if self.metric == "accuracy" else 2
        unit = {"%": "points"}.get(measure(found[0].name).unit, measure(found[0].name).unit)
        with drawing.style("white"):
            height = 1.0 + 0.3 * max(len(item.cells) for item in found)
            same = len({item.tasks for item in found}) == 1
            grid = drawing.facets(titled, self.width, height=height, sharex=same, sharey=same)
            for axes, item in zip(grid.axes.flat, found, strict=True):
                texts = [
                    ["–" if cell.mean is None else f"{cell.mean:.{digits}f}" for cell in line] for line in item.cells
                ]
                table = pd.DataFrame(changes(item), item.stages, item.tasks)
                draw_table(axes, table, colors, pd.DataFrame(texts))
                for j in range(len(item.tasks)):
                    frame = drawing.plt.Rectangle((j, j + 1), 1, 1, fill=False, edgecolor="black", clip_on=False)
                    axes.add_patch(frame).set(linewidth=1.2, zorder=4)
                axes.tick_params(axis="x", labelrotation=20)
            grid.set_axis_labels("evaluated on", "after training on")
            draw_bar(grid.axes.flat, colors, f"change from base ({unit})", aspect=18)
        return grid.figure

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
    from lorabench.report.labels import series_label

    pairs = [pair for pair in zip(results.settings, item.setting, strict=True) if pair[0] != "tasks"]
    keys, values = zip(*pairs, strict=True)
    return series_label(keys, values)


def changes(item: Transfer) -> list[list[float]]:
    """R[i][j] - R[0][j]."""
    base = [cell.mean or 0.0 for cell in item.cells[0]]
    return [[(cell.mean or 0.0) - start for cell, start in zip(line, base, strict=True)] for line in item.cells]


EXAMPLE = TransferMatrix()
