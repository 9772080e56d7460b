"""Tables of a sweep's moved adapters: a row a setting and model, means over seeds; and what was distilled on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from lorabench.adapters.moving.recovery import BASE, COPIED, MOVED, OLD, OLD_BASE, RANDOM, TRAINED
from lorabench.adapters.moving.stage import Moves, of_move
from lorabench.report.aggregate import Cell, common_places, interval, value_text
from lorabench.report.labels import key_label, value_label
from lorabench.report.results import Results, grouped
from lorabench.report.typeset import Column, Sheet
from lorabench.spec.move import Move

ORDER = (BASE, RANDOM, COPIED, MOVED, TRAINED, OLD_BASE, OLD)
LOSSES = {"loss": ("loss", "nats"), "gain": ("gain", "nats"), "recovered": ("recovered", "%")}
PROMPTS = {
    "prompts_made": ("prompts made", ""),
    "prompts_kept": ("kept", ""),
    "kept_share": ("share", "%"),
    "discriminator_accuracy": ("discriminator is right", "%"),
    "steps": ("steps", ""),
}
FACTORS = {"recovered": 100.0, "kept_share": 100.0, "discriminator_accuracy": 100.0}
Row = tuple[tuple[str, ...], list[dict[str, Any]]]
"""What a row begins with, and what it is the mean of: one each of several seeds."""


def moved_sheets(results: Results, moves: Moves) -> list[Sheet]:
    """Those that have rows."""
    names = [key_label(key) for key in results.settings]
    by_model = [
        ((*setting, move.to, move.by, model), each)
        for setting, move, records in _settings(results, moves)
        for model in ORDER
        if (each := [row for record in records for row in record["found"]["losses"] if row["evaluated"] == model])
    ]
    distilled = [
        ((*setting, move.to, move.distil.generator), each)
        for setting, move, records in _settings(results, moves)
        if (each := [told for record in records if (told := record["found"]["distilled"])])
    ]
    sheets = []
    if by_model:
        note = (
            "Mean ± 95% interval (Student t) over seeds, of losses on the validation split in float32. gain: below its "
            "own base's. recovered: of the gain of the same run on the new base (trained), or where there is none of "
            "the adapter on its old base, where that is above 0. random: as large a change in random directions; "
            "copied: ΔW as it is."
        )
        sheets.append(_sheet("moved", "Adapters on another base", [*names, "to", "by", "model"], by_model, LOSSES))
        sheets[-1].notes.append(note)
    if distilled:
        heads = [*names, "to", "generator"]
        caption = "What moved adapters have learned from by data"
        sheets.append(_sheet("moved_prompts", caption, heads, distilled, PROMPTS))
        sheets[-1].notes.append("Mean ± 95% interval (Student t) over seeds. share: of the prompts made, each once.")
    return sheets


def _settings(results: Results, moves: Moves) -> list[tuple[tuple[str, ...], Move, list[dict[str, Any]]]]:
    """Each [[transfer]] and setting, with a record a seed."""
    found = []
    for number, move in enumerate(results.sweep.moves, 1):
        by_run = {record["key"]["run"]["run_id"]: record for record in of_move(moves.records, number)}
        runs = results.runs.loc[[run_id for run_id in results.runs.index if run_id in by_run]]
        for values, chunk in grouped(runs, results.settings):
            records = [by_run[run_id] for run_id in chunk.index]
            found.append((tuple(map(value_label, values)), move, records))
    return found


def _sheet(
    name: str, caption: str, heads: Sequence[str], rows: Sequence[Row], shown: dict[str, tuple[str, str]]
) -> Sheet:
    cells = {key: [_cell(each, key) for _, each in rows] for key in shown}
    kept = [key for key in shown if any(cell.mean is not None for cell in cells[key])]
    places = {key: common_places(cells[key]) for key in kept}
    columns = [Column(label=head, numeric=False) for head in heads]
    columns += [Column(label=shown[key][0], unit=shown[key][1]) for key in kept] + [Column(label="n")]
    texts = [
        [*begin, *(value_text(cells[key][place], places[key]) or "–" for key in kept), str(len(each))]
        for place, (begin, each) in enumerate(rows)
    ]
    tidy: list[dict[str, Any]] = [
        {**dict(zip(heads, begin, strict=True))}
        | {"measure": key, "unit": shown[key][1], "mean": c.mean, "half_width": c.half, "n": c.n}
        for place, (begin, _) in enumerate(rows)
        for key in kept
        for c in [cells[key][place]]
    ]
    return Sheet(name=name, caption=caption, columns=columns, rows=texts, tidy=pd.DataFrame(tidy, dtype=object))


def _cell(rows: Sequence[dict[str, Any]], key: str) -> Cell:
    values = [FACTORS.get(key, 1.0) * row[key] for row in rows if row.get(key) is not None]
    mean, half = interval(values) if values else (None, None)
    return Cell(mean=mean, half=half, n=len(values), num_seeds=len(values), num_runs=len(rows))
