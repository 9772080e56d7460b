"""What diffusion models draw: a strip a setting of the same prompts from the same noise, below the untouched base's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.spec.figure import Canvas, Figure

BASE = "untouched base"


@dataclass(frozen=True, kw_only=True)
class Pictures(Figure):
    """Of the first run of each setting that has drawn; prompts of which nothing was trained stand to the right."""

    section: ClassVar[str] = "cost"
    needs: ClassVar[str] = "runs that have drawn (task.pictures)"
    intervals: ClassVar[bool] = False
    most: ClassVar[int] = 12

    each: int = 1
    """Pictures a prompt."""
    columns: int = 12
    """Prompts at most."""

    def draw(self, results: Any) -> Canvas | None:
        import numpy as np

        from lorabench.config.decode import InputError
        from lorabench.report import drawing
        from lorabench.report.figures._curves import SERIES, settings
        from lorabench.store.pictures import read_sheet

        runs = results.selection.done
        runs = runs[[run_id in results.drawn for run_id in runs.index]]
        if runs.empty:
            return None
        found, looks = settings(results, runs, self.most)
        sheets = {}
        for label in looks:
            try:
                sheets[label] = read_sheet(results.drawn[found.index[found[SERIES] == label][0]])
            except (OSError, InputError):  # as answers: what cannot be read is not shown
                continue
        if not sheets:
            return None
        first = next(iter(sheets.values()))
        sheets = {label: sheet for label, sheet in sheets.items() if sheet.prompts == first.prompts}
        shown = self._shown(first.prompts)
        rows = {BASE: first.base} | {label: sheet.tuned for label, sheet in sheets.items()}
        size, gap = first.base.shape[1:3], max(1, first.base.shape[2] // 12)
        apart = sum(first.prompts[place] not in first.unrelated for place in shown)
        wide, high = size[1] + gap, size[0] + gap
        canvas = np.full((high * len(rows) - gap, wide * len(shown) + 3 * gap, 3), 255, np.uint8)
        left = [wide * column + (3 * gap if column >= apart else 0) for column in range(len(shown))]
        for row, images in enumerate(rows.values()):
            for x, place in zip(left, shown, strict=True):
                canvas[row * high : row * high + size[0], x : x + size[1]] = images[place]
        inches = drawing.COLUMN_INCHES if self.width == "column" else drawing.PAGE_INCHES
        names = 0.5 + 0.063 * max(map(len, rows))  # what the settings' names take, about
        height = min(9.0, 0.6 + (inches - min(names, 0.6 * inches)) * canvas.shape[0] / canvas.shape[1])
        with drawing.facets([""], self.width or "page", height=height, theme="white") as grid:
            axes, figure = grid.axes.flat[0], grid.figure
            axes.imshow(canvas, interpolation="nearest")
            axes.set_anchor("E")  # room that is left over goes to the names
            axes.set_yticks([row * high + size[0] / 2 for row in range(len(rows))], rows)
            words = [drawing.wrapped(first.prompts[place], 14) for place in shown]
            axes.set_xticks([x + size[1] / 2 for x in left], words, rotation=0 if max(map(len, words)) < 8 else 90)
            axes.tick_params(length=0, labeltop=True, labelbottom=False)
            axes.spines[:].set_visible(False)
            trained = f"{len({*first.prompts} - {*first.unrelated})} of what was trained"
            axes.set_ylabel("Setting")
            words_below = f"Prompts: {trained}, then {len({*first.unrelated})} of what was not"
            axes.set_xlabel(words_below, loc="right")  # where prompts are few it is wider than the strip
        return figure

    def _shown(self, prompts: tuple[str, ...]) -> list[int]:
        """The places of the first pictures of each prompt."""
        places = {prompt: [place for place, other in enumerate(prompts) if other == prompt] for prompt in prompts}
        return [place for held in [*places.values()][: self.columns] for place in held[: self.each]]

    def caption(self) -> str:
        return (
            "Pictures of the same prompts from the same noise, by the untouched base and by the first run of each "
            "setting. What was not trained should stay as the base has it."
        )


EXAMPLE = Pictures()
