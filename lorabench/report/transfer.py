"""The matrix of a sequence of tasks, R[i][j] on task j after training on i tasks: the mean over a setting's seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from lorabench.report.aggregate import Cell, cell, common_places, value_text
from lorabench.report.labels import capitalized, key_label, measure, measure_label, value_label
from lorabench.report.results import Results, Selection, grouped
from lorabench.report.typeset import Column, Sheet
from lorabench.training.sequence import METRICS


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Of one setting and one metric. `cells[i][j]`: (T + 1, T), row 0 being the untouched base."""

    setting: tuple[Any, ...]
    """The values of `results.settings`."""
    tasks: tuple[str, ...]
    name: str
    """The metric by its name in MEASURES: `valid_token_accuracy`."""
    cells: list[list[Cell]]

    @property
    def stages(self) -> list[str]:
        """What row i comes after."""
        return ["base", *self.tasks]


def transfers(results: Results, selection: Selection) -> list[Transfer]:
    """Each setting and metric for which a sequence is done, in the sweep's order; accuracy before loss."""
    runs = selection.runs
    if "tasks" not in runs or not results.sequences:
        return []
    found = []
    for setting, chunk in grouped(runs[runs["tasks"].notna()], results.settings):
        done = {run_id: results.sequences[run_id] for run_id in chunk.index if run_id in results.sequences}
        if not done:
            continue
        first = next(iter(done.values()))
        for metric in [metric for metric in METRICS if metric in first["matrices"]]:
            matrices = {run_id: each["matrices"][metric] for run_id, each in done.items()}
            size, name = len(first["tasks"]), f"valid_{metric}"
            cells = [[_cell(chunk, matrices, name, i, j) for j in range(size)] for i in range(size + 1)]
            found.append(Transfer(setting=setting, tasks=tuple(first["tasks"]), name=name, cells=cells))
    return found


def _cell(chunk: pd.DataFrame, matrices: dict[str, list[list[float]]], name: str, i: int, j: int) -> Cell:
    values = [matrices[run_id][i][j] if run_id in matrices else float("nan") for run_id in chunk.index]
    return cell(chunk.assign(**{name: pd.Series(values, index=chunk.index, dtype=float)}), name)


def transfer_sheet(results: Results, selection: Selection) -> Sheet | None:
    """A row a setting and stage, a column a task; the tidy table has every metric. None where there is no sequence."""
    found = transfers(results, selection)
    if not found:
        return None
    shown = [item for item in found if item.name == found[0].name]
    tasks = list(dict.fromkeys(task for item in shown for task in item.tasks))
    places = common_places(c for item in shown for line in item.cells for c in line)
    rows = [
        [*map(value_label, item.setting), stage, *_texts(item, line, tasks, places)]
        for item in shown
        for stage, line in zip(item.stages, item.cells, strict=True)
    ]
    columns = [Column(label=key_label(key), numeric=False) for key in results.settings]
    columns += [Column(label="after", numeric=False)]
    columns += [Column(label=task, unit=measure(found[0].name).unit) for task in tasks]
    return Sheet(
        name="transfer",
        caption=f"{capitalized(measure_label(found[0].name))} on each task, before training and after each task",
        columns=columns,
        rows=rows,
        notes=["Mean ± 95% interval (Student t) over seeds. base: before training."],
        tidy=pd.DataFrame([row for item in found for row in _tidy(results, item)], dtype=object),
    )


def _texts(item: Transfer, line: list[Cell], tasks: list[str], places: int | None) -> list[str]:
    by_task = dict(zip(item.tasks, line, strict=True))
    return [value_text(by_task[task], places) if task in by_task else "–" for task in tasks]


def _tidy(results: Results, item: Transfer) -> list[dict[str, Any]]:
    return [
        dict(zip(results.settings, item.setting, strict=True))
        | {"num_tasks_trained": i, "after": stage, "task": task, "measure": item.name, "unit": measure(item.name).unit}
        | {"mean": c.mean, "half_width": c.half, "low": c.low, "high": c.high, "n": c.n, "num_seeds": c.num_seeds}
        for i, (stage, line) in enumerate(zip(item.stages, item.cells, strict=True))
        for task, c in zip(item.tasks, line, strict=True)
    ]
