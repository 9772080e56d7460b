"""The table of what changed in the weights: metrics of ΔW by setting and kind of module, beside their nulls."""

from __future__ import annotations

from typing import Any

import pandas as pd

from lorabench.report.aggregate import Cell, cell, common_places, plain, value_text
from lorabench.report.footnotes import selection_notes, single_seed
from lorabench.report.labels import key_label, measure_label, value_label
from lorabench.report.results import Results, Selection, grouped
from lorabench.report.typeset import Column, Sheet
from lorabench.report.update_metrics import VALUE, How, metric_rows, ordered_kinds, per_run

METRICS: dict[str, How] = {
    "spectrum.relative_norm": "mean",
    "spectrum.rank_90": "mean",
    "spectrum.effective_rank_entropy": "mean",
    "alignment.amplification": "geometric",
    "intruders.num_intruders": "mean",
}
"""With how the layers of a run are averaged."""


def changes_sheet(results: Results, selection: Selection, name: str = "changes") -> Sheet | None:
    """A row a setting and kind of module; None where no run has an analyzed ΔW."""
    frames = {metric: _per_run(results, selection, metric) for metric in METRICS}
    frames = {metric: frame for metric, frame in frames.items() if len(frame)}
    if not frames:
        return None
    keys = [*results.settings, "kind"]
    settings = [values for values, _ in grouped(selection.done, results.settings)]
    kinds = ordered_kinds(kind for frame in frames.values() for kind in frame["kind"])
    found = {metric: dict(grouped(frame, keys)) for metric, frame in frames.items()}
    places = [(*setting, kind) for setting in settings for kind in kinds]
    places = [place for place in places if any(place in groups for groups in found.values())]
    cells = [[_cell(groups.get(place)) for groups in found.values()] for place in places]
    digits = [common_places(item for item in column if item) for column in zip(*cells, strict=True)]
    columns = [Column(label=key_label(key), numeric=False) for key in results.settings]
    columns += [Column(label="module", numeric=False)]
    columns += [Column(label=measure_label(metric)) for metric in frames]
    return Sheet(
        name=name,
        caption="What changed in the weights, by kind of module",
        columns=[*columns, Column(label="n")],
        rows=[[*map(value_label, place), *map(_text, line, digits), _count(line)]
              for place, line in zip(places, cells, strict=True)],
        notes=_notes(results, selection, cells),
        tidy=pd.DataFrame(_tidy(keys, list(frames), places, cells), dtype=object),
    )  # fmt: skip


def _per_run(results: Results, selection: Selection, metric: str) -> pd.DataFrame:
    rows = metric_rows(results, metric, selection.done)
    return rows if rows.empty else per_run(results, rows, ["kind"], METRICS[metric])


def _cell(rows: pd.DataFrame | None) -> Cell | None:
    return None if rows is None else cell(rows, VALUE)


def _text(item: Cell | None, places: int | None) -> str:
    """`0.21 ± 0.02 [0.19]`, the null in brackets."""
    if item is None or item.mean is None:
        return "–"
    return value_text(item, places) + ("" if item.null is None else f" [{plain(item.null)}]")


def _count(line: list[Cell | None]) -> str:
    return str(max(item.n for item in line if item))


def _notes(results: Results, selection: Selection, cells: list[list[Cell | None]]) -> list[str]:
    alone = single_seed([[item for item in line if item] for line in cells])
    return [
        "Means over the layers of a kind (of the amplification, a ratio, the geometric mean), then mean ± 95% interval "
        f"(Student t) over seeds; n: runs behind the means.{alone}",
        "In brackets: ranks of a random update of the same shape, rank and norm; amplification and intruder dimensions "
        "(a matrix; top 10, ε = 0.5) with random directions in place of ΔW's.",
        *selection_notes(results, selection),
    ]


def _tidy(
    keys: list[str], metrics: list[str], places: list[tuple[Any, ...]], cells: list[list[Cell | None]]
) -> list[dict[str, Any]]:
    return [
        dict(zip(keys, place, strict=True))
        | {"measure": metric, "mean": item.mean, "half_width": item.half, "low": item.low, "high": item.high}
        | {"null": item.null, "n": item.n, "num_seeds": item.num_seeds}
        for place, line in zip(places, cells, strict=True)
        for metric, item in zip(metrics, line, strict=True)
        if item
    ]
