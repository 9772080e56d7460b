"""A publication of which a sweep repeats a part: what it reports, to stand beside what the sweep finds."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from lorabench.config import plugins
from lorabench.config.decode import InputError, decode
from lorabench.config.quote import show


@dataclass(frozen=True, kw_only=True)
class Reported:
    """What one table, figure or section of it reports, in words and, where there are any, numbers."""

    item: str
    """`Table 6`: which. The claims that put it to the test name it, `reported = "Table 6"`."""
    says: str
    """What it found, in a sentence or two."""
    numbers: tuple[tuple[str | float, ...], ...] = ()
    """A table of its own: the first row is its head."""
    caption: str = ""
    """What these numbers are, with their unit."""
    shown_by: tuple[str, ...] = ()
    """Names of the sweep's tables and figures that show the same; of figures with one name the second is `NAME_2`."""

    def __post_init__(self) -> None:
        problems = [f'{key} = "": needs some words' for key in ("item", "says") if not getattr(self, key).strip()]
        lengths = {len(row) for row in self.numbers}
        if self.numbers and (len(self.numbers) < 2 or len(lengths) > 1 or not min(lengths)):
            problems.append("numbers: must be a row of heads and one or more rows of as many cells")
        if self.caption and not self.numbers:
            problems.append(f"caption = {show(self.caption)}: there are no numbers")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def heads(self) -> list[str]:
        return [*map(_text, self.numbers[0])] if self.numbers else []

    @property
    def rows(self) -> list[list[str]]:
        return [[*map(_text, row)] for row in self.numbers[1:]]


@dataclass(frozen=True, kw_only=True)
class Paper:
    """The section `[paper]` of a sweep file; any sweep may have one."""

    title: str
    source: str
    """Who, when and where: `Hu et al. 2021, arXiv 2106.09685`."""
    reports: tuple[Reported, ...]

    def __post_init__(self) -> None:
        problems = [f'{key} = "": needs some words' for key in ("title", "source") if not getattr(self, key).strip()]
        problems += [] if self.reports else ["reports = []: needs at least one [[paper.reports]]"]
        items = [item.item for item in self.reports]
        problems += [
            f"reports: {show(item)} stands there twice" for item in dict.fromkeys(items) if items.count(item) > 1
        ]
        if problems:
            raise ValueError("\n".join(problems))

    def unknown(self, shown: Collection[str]) -> Iterator[str]:
        """A problem for each name in `shown_by` that is none of the sweep's tables and figures."""
        for item in self.reports:
            for name in item.shown_by:
                if name not in shown:
                    where = f"paper.reports {show(item.item)}: shown_by = {show(name)}"
                    yield f"{where}: {plugins.unknown('table or figure', name, [*shown])}"

    def beside(self, name: str) -> list[Reported]:
        """What it reports of that which a table or figure of this name shows."""
        return [item for item in self.reports if name in item.shown_by]


def read_paper(table: Any) -> Paper:
    """The section's content. InputError with all its problems, each report's with its number."""
    problems, blocks = [], table.get("reports", []) if isinstance(table, dict) else []
    for number, block in enumerate(blocks if isinstance(blocks, list) else [], 1):
        try:
            decode(Reported, block, f"paper.reports {number}: ")
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return decode(Paper, table, "paper.")


def _text(cell: str | float) -> str:
    return cell if isinstance(cell, str) else f"{cell:.10g}"
