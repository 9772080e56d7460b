"""Tasks in sequence: how each does before training and after each task, as a matrix for each setting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lorabench.report.labels import distinct, measure, series_label
from lorabench.spec.figure import Canvas, Figure, Frame

MAX_PANELS = 12


@dataclass(frozen=True, kw_only=True)
class TransferMatrix(Figure):
    """A panel a setting: numbers are means over seeds, colours the change from the untouched base."""

    section: ClassVar[str] = "cost"
    needs: ClassVar[str] = "runs that are done of several tasks, one after the other"
    intervals: ClassVar[bool] = False

    metric: Literal["accuracy", "loss"] = "accuracy"
    """Accuracy (of a language model, the share of tokens predicted right), or the validation loss."""

    def draw(self, results: Any) -> Canvas | None:
        import pandas as pd

        from lorabench.report import drawing
        from lorabench.report.figures._heat import around_zero, draw_tables
        from lorabench.report.transfer import transfers

        found = [item for item in transfers(results, results.selection) if item.name.endswith(self.metric)][:MAX_PANELS]
        if not found:
            return None
        titled: dict[str, Frame] = {}
        for item in found:
            means = [[cell.mean for cell in line] for line in item.cells]
            title = distinct(_title(results, item), titled, " ({})")
            titled[title] = pd.DataFrame(means, item.stages, item.tasks, dtype=float)
        changes = [table - table.iloc[0] for table in titled.values()]
        best, digits = ("RdBu", 1) if self.metric == "accuracy" else ("RdBu_r", 2)  # blue is better
        texts = [table.map(f"{{:.{digits}f}}".format).replace("nan", "–") for table in titled.values()]
        unit = measure(found[0].name).unit.replace("%", "points")
        height = 1.0 + 0.3 * max(map(len, changes))
        same = len({item.tasks for item in found}) == 1
        with drawing.facets(titled, self.width, height=height, sharex=same, sharey=same, theme="white") as grid:
            draw_tables(
                grid.axes.flat, changes, around_zero(changes, best), f"change from base ({unit})", texts, aspect=18
            )
            for axes, table in zip(grid.axes.flat, changes, strict=True):
                for j in range(len(table.columns)):
                    frame = drawing.plt.Rectangle((j, j + 1), 1, 1, fill=False, edgecolor="black", clip_on=False)
                    axes.add_patch(frame).set(linewidth=1.2, zorder=4)
                axes.tick_params(axis="x", labelrotation=20)
            grid.set_axis_labels("evaluated on", "after training on")
        return grid.figure

    def caption(self) -> str:
        return (
            f"Validation {self.metric} on each task (columns) before training and after each task of the sequence "
            "(rows), the mean over seeds; colours: the change from the untouched base, blue where it is better. "
            "Framed: the task just trained; below the frames is what training on later tasks does to earlier ones, "
            "above them what earlier tasks give later ones (Lopez-Paz and Ranzato 2017)."
        )


EXAMPLE = TransferMatrix()


def _title(results: Any, item: Any) -> str:
    """The setting without its tasks, which the axes tell."""
    pairs = [pair for pair in zip(results.settings, item.setting, strict=True) if pair[0] != "tasks"]
    return series_label(*zip(*pairs, strict=True))
