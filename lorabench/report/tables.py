"""The tables of a sweep: means over seeds with their intervals, what is behind each cell, and what failed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from lorabench.config.durable import write_bytes
from lorabench.report import analysis_rows, typeset
from lorabench.report.aggregate import Cell, cell, common_places, plain, value_text
from lorabench.report.analysis_rows import long_tables
from lorabench.report.columns import columns_page
from lorabench.report.footnotes import (
    applicability,
    data_notes,
    declared_notes,
    mixture_notes,
    optimism_notes,
    packed_notes,
    selection_notes,
    single_seed,
)
from lorabench.report.labels import (  # fmt: skip
    capitalized,
    column_label,
    distinct,
    key_label,
    listed,
    measure,
    measure_label,
    value_label,
    with_unit,
)
from lorabench.report.paths import path_sheet
from lorabench.report.results import Results, Selection, grouped, kept_rows, ordered, ordinal, selected
from lorabench.report.transfer import transfer_sheet
from lorabench.report.typeset import Column, Sheet
from lorabench.spec.generate import METRICS
from lorabench.spec.sweep import Table
from lorabench.store.record import Status

NOT_APPLICABLE = "n/a"
Files = dict[str, bytes]
Attempt = Callable[[str, Callable[[], Any]], Any]
"""Makes what has that name, or notes what it raises, as `page.Attempts` does."""
ARROWS = {"largest": " ↑", "smallest": " ↓"}


def directly(name: str, make: Callable[[], Any]) -> Any:
    return make()


def write_tables(results: Results, sheets: list[Sheet], folder: Path, attempt: Attempt = directly) -> list[Path]:
    """Write every table as csv, md and tex, `runs.csv`, `subspace.csv` where there is one, the long tables of all that
    was analyzed, and COLUMNS.md."""
    makers: dict[str, Callable[[], Files]] = {sheet.name: partial(_sheet_files, sheet) for sheet in sheets}
    makers["runs.csv"] = lambda: {"runs.csv": typeset.csv(results.runs.reset_index()).encode()}
    makers["subspace.csv"] = partial(_subspace_files, results)
    makers["long tables"] = partial(_long_files, results)
    files: Files = {}
    for name, make in makers.items():
        made = attempt(f"table {name}", make)
        files |= made if isinstance(made, dict) else {}
    for name, content in files.items():
        write_bytes(folder / name, content)
    return [folder / name for name in files]


def _sheet_files(sheet: Sheet) -> Files:
    texts = {"csv": typeset.csv(sheet.tidy), "md": typeset.markdown(sheet), "tex": typeset.latex(sheet)}
    return {f"{sheet.name}.{kind}": text.encode() for kind, text in texts.items()}


def _subspace_files(results: Results) -> Files:
    table = subspace_table(results)
    return {} if table.empty else {"subspace.csv": typeset.csv(table).encode()}


def _long_files(results: Results) -> Files:
    tables = long_tables(results)
    files = {"COLUMNS.md": columns_page(results, tables).encode()}
    for name, table in tables.items():
        files |= analysis_rows.files(name, table)
    return files


def build_tables(results: Results, attempt: Attempt = directly) -> list[Any]:
    """The summary, then the sweep's own tables; names are made distinct."""
    selection = selected(results)
    sheets = [attempt("table summary", lambda: summary(results, selection))]
    matrix = attempt("table transfer", lambda: transfer_sheet(results, selection))
    sheets += [matrix] if matrix else []
    along = attempt("table paths", lambda: path_sheet(results))
    sheets += [along] if along else []
    if results.test_sets:
        sheets.append(attempt("table tests", lambda: declared(results, selection, _of_test_sets(results), "tests")))
    taken = {
        "summary",
        "runs",
        "subspace",
        "transfer",
        "paths",
        "tests",
        "metrics",
        "pairs",
        "steps",
        "claims",
        "comparisons",
    }
    for table in results.sweep.tables:
        name = distinct(table.title, taken)
        taken.add(name)
        own = results.of(table.where)
        sheets.append(attempt(f"table {name}", partial(declared, own, selected(own), table, name)))
    return sheets


def _of_test_sets(results: Results) -> Table:
    """Each of the sweep's own test sets, and the mean over them, by the first of the metrics that all report."""
    found = [name.removeprefix("test_mean_") for name in results.runs if name.startswith("test_mean_")]
    metric = next((name for name in (*METRICS, "accuracy", "pearson", "token_accuracy") if name in found), "loss")
    names = [*(f"{split}_{metric}" for split in results.test_sets), f"test_mean_{metric}"]
    shown = [name for name in names if name in results.runs]
    return Table(rows=results.settings, value=shown, caption="Further test sets, and the mean over them")


def summary(results: Results, selection: Selection) -> Sheet:
    """One row a setting: what it trains, costs and reaches."""
    stem = results.quality
    names = ["num_trainable", "peak_gib", "tensor_peak_gib", "tokens_per_second", "images_per_second"]
    names += [f"base_valid_{stem}", "valid_majority", f"valid_{stem}", f"test_{stem}"]
    written = "test" if any(f"test_{metric}" in results.runs for metric in METRICS) else "valid"
    names += [f"{who}{written}_{metric}" for metric in METRICS for who in ("base_", "")]
    names += ["forgetting"]
    names += ["average_final", "backward_transfer", "forward_transfer"]
    names = [name for name in names if name in results.runs and results.runs[name].notna().any()]
    settings = sorted_groups(selection.runs, results.settings)
    cells = [[cell(runs, name) for name in names] for _, runs in settings]
    digits = [common_places(column) for column in zip(*cells, strict=True)] if cells else []
    rows, tidy = [], []
    for (values, runs), line in zip(settings, cells, strict=True):
        texts = [value_text(item, common) or _absent(item) for item, common in zip(line, digits, strict=True)]
        rows.append([*map(value_label, values), *_chosen(results, selection, runs), *texts, *_standing(runs)])
        tidy += [
            dict(zip(results.settings, values, strict=True)) | _numbers(results, selection, runs, name, item)
            for name, item in zip(names, line, strict=True)
        ]
    columns = [Column(label=key_label(key), numeric=False) for key in results.settings]
    columns += [Column(label=f"best {key.rpartition('.')[2]}") for key in results.over]
    columns += [Column(label=measure_label(name), unit=measure(name).unit) for name in names]
    columns += [Column(label="n"), Column(label="status", numeric=False)]
    notes = ["Mean ± 95% interval (Student t) over seeds; n: runs behind the means." + single_seed(cells)]
    notes += applicability(cells)
    return Sheet(
        name="summary",
        caption=f"Summary of {results.sweep.name}",
        columns=columns,
        rows=rows,
        notes=[
            *notes,
            *selection_notes(results, selection),
            *optimism_notes(results, selection),
            *mixture_notes(results, selection.runs, results.settings),
            *packed_notes(results, selection.runs, names),
            *data_notes(results),
        ],
        tidy=pd.DataFrame(tidy, dtype=object),  # a rank stays whole beside a method that has none
    )  # fmt: skip


def declared(results: Results, selection: Selection, table: Table, name: str) -> Sheet:
    """A `[[table]]` of the sweep: rows by columns by values."""
    runs = selection.runs
    heads = ordered(runs[table.columns]) if table.columns else [None]
    settings = sorted_groups(runs, table.rows)
    keys = [*table.rows, *([table.columns] if table.columns else [])]
    found: dict[tuple[int, Any, str], Cell] = {}
    tidy = []
    for row, (values, group) in enumerate(settings):
        for head in heads:
            chunk = kept_rows(group, (item == head for item in group[table.columns])) if table.columns else group
            for value in table.values if len(chunk) else []:
                found[row, head, value] = item = cell(chunk, value)
                place = dict(zip(keys, (*values, head), strict=False))
                tidy.append(place | _numbers(results, selection, chunk, value, item))
    heads_by_value = [(value, head) for value in table.values for head in heads]
    rows = _declared_rows(table, settings, heads_by_value, found)
    columns = [Column(label=key_label(key), numeric=False) for key in table.rows]
    columns += [_column(table, value, head) for value, head in heads_by_value]
    if not table.columns:
        columns += [Column(label="n"), Column(label="status", numeric=False)]
    has_gaps = table.columns is not None and len(found) < len(heads_by_value) * len(rows)
    return Sheet(
        name=name,
        caption=table.caption or _caption(table),
        columns=columns,
        rows=rows,
        notes=declared_notes(results, selection, table, list(found.values()), has_gaps),
        tidy=pd.DataFrame(tidy, dtype=object),  # a rank stays whole beside a method that has none
    )  # fmt: skip


def subspace_table(results: Results) -> pd.DataFrame:
    """φ(i, j) for i and j that are powers of two, over the layers of each kind; chance beside it."""
    frame = results.analyses.get("subspace", pd.DataFrame())
    if frame.empty:
        return frame
    powers = [2**exponent for exponent in range(20)]
    frame = frame[frame["i"].isin(powers) & frame["j"].isin(powers)]
    frame = frame.assign(pair=frame["run_a"].astype(str) + " " + frame["run_b"].astype(str))
    for key in results.settings:
        shared = {
            pair: _shared(*(results.runs.at[run, key] for run in pair.split())) for pair in frame["pair"].unique()
        }
        frame[key] = pd.Series([shared[pair] for pair in frame["pair"]], index=frame.index, dtype=object)
    keys = [*results.settings, "axis", "value_a", "value_b", "side", "kind", "i", "j"]
    groups = frame.groupby(keys, dropna=False, sort=False, observed=True)
    table = groups.agg(
        phi=("phi", "mean"), phi_min=("phi", "min"), phi_max=("phi", "max"), chance=("chance", "mean"),
        chance_std=("chance_std", "mean"), num_layers=("layer", "nunique"), num_pairs=("pair", "nunique"),
    ).reset_index()  # fmt: skip
    columns = [[ordinal(value) for value in table[key]] for key in keys]
    order = sorted(range(len(table)), key=list(zip(*columns, strict=True)).__getitem__)
    return table.iloc[order].reset_index(drop=True)


def _shared(a: Any, b: Any) -> Any:
    """What both runs of a pair have, or the one that has the key; None where they differ: the axis tells that."""
    return a if a == b or b is None else b if a is None else None


def sorted_groups(runs: pd.DataFrame, keys: list[str]) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
    """Groups in reading order: each key's numbers ascending, its other values as the sweep has them."""
    orders = [{value: i for i, value in enumerate(ordered(runs[key]))} for key in keys]
    groups = grouped(runs, keys)
    return sorted(groups, key=lambda item: [order[value] for order, value in zip(orders, item[0], strict=True)])


def _numbers(results: Results, selection: Selection, runs: pd.DataFrame, name: str, item: Cell) -> dict[str, Any]:
    """The tidy row of one cell, after its keys."""
    row = {"measure": name, "unit": measure(name).unit, "mean": item.mean, "half_width": item.half}
    row |= {"low": item.low, "high": item.high, "null": item.null, "n": item.n, "num_seeds": item.num_seeds}
    row |= {
        "num_failed": item.num_failed,
        "num_pending": item.num_pending,
        "status": item.status_text or "done",
    }
    for key in results.over:
        values = ordered(runs[key])
        row[f"best {key}"] = values[0] if len(values) == 1 else " / ".join(map(value_label, values))
    edges = {choice["edge"] or "" for choice in _choices(results, selection, runs)}
    return row | ({"edge": " / ".join(sorted(edges - {""}))} if results.over else {})


def _choices(results: Results, selection: Selection, runs: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of `choices` that the runs belong to."""
    if selection.choices.empty:
        return []
    keys = [key for key in selection.choices.columns if key in results.runs]
    settings = {values for values, _ in grouped(runs, keys)}
    return [row for row in selection.rows if tuple(row[key] for key in keys) in settings]


def _chosen(results: Results, selection: Selection, runs: pd.DataFrame) -> list[str]:
    """The chosen values of a setting, with an arrow where the first lies at the edge of those tried."""
    choices = _choices(results, selection, runs)
    texts = []
    for key in results.over:
        values = [
            value_label(choice[key]) + ARROWS.get(choice["edge"], "") * (key == results.over[0]) for choice in choices
        ]
        texts.append(" / ".join(dict.fromkeys(values)))
    return texts


def _text(item: Cell | None, common: int | None, most: int) -> str:
    """`2.31 ± 0.02 (n = 2, oom 1/3)`; `oom 3/3` alone where nothing is left."""
    if item is None:
        return "–"
    remarks = [f"n = {item.n}"] if 0 < item.n < most else []
    remarks += [item.status_text] if item.status_text else []
    text = value_text(item, common) + _null(item)
    if not text:
        return item.status_text or ("not measured" if item.applicable else NOT_APPLICABLE)
    return f"{text} ({', '.join(remarks)})" if remarks else text


def _absent(item: Cell) -> str:
    return "–" if item.applicable else NOT_APPLICABLE


def _null(item: Cell) -> str:
    if item.null is None or item.mean is None:
        return ""
    return f" [{plain(item.null)}]"


def _declared_rows(
    table: Table,
    settings: list[tuple[tuple[Any, ...], pd.DataFrame]],
    heads: list[tuple[str, Any]],
    found: dict[tuple[int, Any, str], Cell],
) -> list[list[str]]:
    """Each cell says what it lacks; where a row is one group of runs, its last two columns say it once."""
    digits = {value: common_places(c for k, c in found.items() if k[2] == value) for value in table.values}
    most = max((item.n for item in found.values()), default=0)
    rows = []
    for row, (values, runs) in enumerate(settings):
        texts = [_text(found.get((row, head, value)), digits[value], most) for value, head in heads]
        if not table.columns:
            texts = [
                value_text(found[row, None, value], digits[value]) + _null(found[row, None, value])
                or _absent(found[row, None, value])
                for value, _ in heads
            ]
            texts += _standing(runs)
        rows.append([*map(value_label, values), *texts])
    return rows


def _standing(runs: pd.DataFrame) -> list[str]:
    """`["2/3", "oom 1/3"]`, or `["3", "done"]`."""
    done = int((runs["status"] == Status.DONE).sum())
    return [str(done) if done == len(runs) else f"{done}/{len(runs)}", cell(runs, "").status_text or "done"]


def _column(table: Table, value: str, head: Any) -> Column:
    if not table.columns:
        return Column(label=measure_label(value), unit=measure(value).unit)
    key, label = key_label(table.columns), column_label(table.columns, head)
    flat = label if head is None else f"{key} {label}"
    if len(table.values) == 1:
        return Column(label=label, span=key, flat=flat)
    return Column(label=label, span=f"{with_unit(value)}, {key}", flat=f"{with_unit(value)}, {flat}")


def _caption(table: Table) -> str:
    keys = [*table.rows, *([table.columns] if table.columns else [])]
    name = with_unit if table.columns and len(table.values) == 1 else measure_label
    return capitalized(f"{listed(map(name, table.values))} by {listed(map(key_label, keys))}")
