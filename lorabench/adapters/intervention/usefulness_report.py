"""What scaling the singular directions of ΔW one by one has shown, as a table and as a figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.adapters.intervention.intervene import TUNED
from lorabench.adapters.intervention.usefulness import LOSSES, OWN, RANDOM
from lorabench.report.aggregate import plain
from lorabench.report.correlation import spearman
from lorabench.report.page import Part, drawn
from lorabench.terminal.text import TextTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]
ABOUT = (
    "Change of the loss (nats) where direction i of every layer's ΔW is scaled by λ, what the gradient foretells of it",
    "to first order, and what as large a change in random directions does",
)
TITLES = {"valid_loss": "Task", "retain_loss": "What is retained"}
LABELS = {"change": "as evaluated", "first_order": "first order", "random": "random directions"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """Direction `index` of all layers: its share of Σ σ² of those that were looked at, and by loss what it changes."""

    index: int
    energy: float
    change: dict[str, float]
    first_order: dict[str, float]
    random: dict[str, float]


def make_rows(record: Record) -> list[Row]:
    points = {point["scaled"]: point for point in record["points"]}
    matrices, scale = record["matrices"], record["key"]["scale"]
    total = sum(value**2 for each in matrices for value in each["singular_values"])
    names = [name for name in LOSSES if name in points[TUNED]]

    def changes(kind: str, i: int) -> dict[str, float]:
        return {name: points[f"{kind} {i}"][name] - points[TUNED][name] for name in names}

    def summed(i: int, values: Iterator[list[float]]) -> float:
        return sum(own[i - 1] for own in values if len(own) >= i)

    return [
        Row(
            index=i,
            energy=summed(i, ([s**2 for s in each["singular_values"]] for each in matrices)) / total,
            change=changes(OWN, i),
            first_order={
                name: (scale - 1) * summed(i, (each["sensitivity"][name] for each in matrices)) for name in names
            },
            random=changes(RANDOM, i),
        )
        for i in range(1, 1 + max(len(each["singular_values"]) for each in matrices))
    ]


def usefulness_text(records: Sequence[Record]) -> str:
    """A table a run, with what correlates."""
    lines = [*ABOUT]
    for record in records:
        lines += ["", f"{record['key']['run_id']}, λ = {record['key']['scale']:g}", _table(make_rows(record)).text]
        lines += _remarks(record)
    return "\n".join(lines)


def usefulness_part(record: Record) -> Part:
    """A page's section of one run."""
    rows = make_rows(record)
    return Part(
        title=f"Directions of ΔW of {record['key']['run_id']}, each scaled by λ = {record['key']['scale']:g}",
        text=f"{' '.join(ABOUT)}.",
        tables=[_table(rows)],
        figures=[drawn("usefulness", f"{' '.join(ABOUT)}.", figure(rows))],
        notes=_remarks(record),
    )


def _table(rows: Sequence[Row]) -> TextTable:
    found = []
    for row in rows:
        cells = {"i": str(row.index), "σ² (%)": plain(100 * row.energy)}
        for name in row.change:
            cells |= {f"Δ {name}": plain(row.change[name]), f"first order, {name}": plain(row.first_order[name]),
                      f"random, {name}": plain(row.random[name])}  # fmt: skip
        found.append(cells)
    return TextTable(title="", heads=list(found[0]), rows=found)


def _remarks(record: Record) -> list[str]:
    rows, lines = make_rows(record), []
    for name in rows[0].change:
        found = spearman([row.first_order[name] for row in rows], [row.change[name] for row in rows])
        falls = sum(row.change[name] < 0 for row in rows)
        lines.append(f"{name}: falls with {falls} of {len(rows)} directions scaled")
        lines += (
            [f"{name}: Spearman's {found} over directions, of first order with what was evaluated"] if found else []
        )
    return lines


def figure(rows: Sequence[Row]) -> Figure:
    """Direction against change of loss, a panel a loss."""
    import pandas as pd
    import seaborn as sns

    from lorabench.report import drawing

    names, looks = list(rows[0].change), drawing.looks(LABELS)
    with drawing.facets(map(TITLES.__getitem__, names), height=2.3, sharey=False) as grid:
        for name, axes in zip(names, grid.axes.flat, strict=True):
            for key, look in looks.items():
                points = pd.DataFrame(
                    {"i": [row.index for row in rows], "y": [getattr(row, key)[name] for row in rows]}
                )
                sns.lineplot(
                    points, x="i", y="y", ax=axes, color=look.color, marker=look.marker, linestyle=look.dashes,
                    markersize=4, markeredgecolor=look.color, errorbar=None,
                )  # fmt: skip
            axes.axhline(0, color=drawing.REFERENCE, linewidth=0.7, zorder=1)
            drawing.whole_numbers(axes.xaxis, 10)
        grid.set_axis_labels("Direction i of ΔW", "Change of the loss (nats)")
        drawing.legend_below(grid.figure, {LABELS[key]: look for key, look in looks.items()})
    return grid.figure


def draw(records: Sequence[Record], file: Path) -> list[Path]:
    """The figure of each run, pdf and png; of several runs with the run's id behind the name."""
    from lorabench.report import drawing

    files: list[Path] = []
    for record in records:
        stem = file.stem if len(records) == 1 else f"{file.stem}-{record['key']['run_id']}"
        files += drawing.save(figure(make_rows(record)), file.with_name(stem))
    return files
