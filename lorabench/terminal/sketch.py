"""Small plots of characters: plain text, for a terminal and for a log."""

from __future__ import annotations

import math
from collections.abc import Sequence

EIGHTHS = " ▁▂▃▄▅▆▇█"
SHADES = " ░▒▓█"
NULL_MARK = "┄"


def blocks(values: Sequence[float | None], low: float, high: float) -> str:
    """A block a value, from ▁ (`low`) to █ (`high`); a dot where there is none."""
    span = (high - low) or 1.0
    return "".join("·" if value is None else EIGHTHS[1 + round(7 * (value - low) / span)] for value in values)


def shades(grid: Sequence[Sequence[float]], high: float, width: int = 2) -> list[str]:
    """A line a row of a grid in [0, `high`], each value `width` characters: from blank to █ in five steps."""
    return ["".join(SHADES[min(4, round(4 * value / high))] * width for value in row) for row in grid]


def bars(values: Sequence[float], marks: Sequence[float], height: int = 8, width: int = 1) -> list[str]:
    """A bar chart on a log scale of values in (0, 1], with a dashed line at each bar's mark; decades at the left.

    `width` characters a bar; eight levels a character. The axis ends at the decade below the smallest of all.
    """
    smallest = min([*values, *marks])
    decades = max(1, math.ceil(-math.log10(smallest) - 1e-9))
    levels = [[8 * height * (1 + math.log10(value) / decades) for value in each] for each in (values, marks)]
    labels = {round(height * k / decades): f"1e-{k}" if k else "1" for k in range(decades + 1)}
    lines = []
    for line in range(height):
        floor = 8 * (height - 1 - line)
        cells = [_cell(bar - floor, mark - floor) * width for bar, mark in zip(*levels, strict=True)]
        lines.append(f"{labels.get(line, ''):>5} │{''.join(cells)}".rstrip())
    return [*lines, f"{labels[height]:>5} └{'─' * width * len(values)}"]


def _cell(bar: float, mark: float) -> str:
    """What a bar and its mark show in one line; both in eighths above the line's foot, where 8 is its top."""
    return NULL_MARK if 0 < mark <= 8 else EIGHTHS[max(0, min(8, round(bar)))]
