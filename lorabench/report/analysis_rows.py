"""Everything that the analyses have found, as long tables: one row a run, layer and metric, and one a pair of runs.

steps.parquet                        the logs of the steps of all runs that have ended
metrics.parquet   pairs.parquet      the analyses of single runs, and of pairs, that name what they give `metric`
<analysis>.parquet                   each of the others: `singular_values`, `subspace`, ...
"""

from __future__ import annotations

import gzip
from typing import Any

import pandas as pd
import pyarrow as pa
from pyarrow import csv, parquet

from lorabench.report.results import Results, is_number, selected

PLAIN_ROWS, MOST_ROWS = 100_000, 2_000_000
"""Tables of up to so many rows are also written as csv, and as csv.gz; longer ones are parquet alone."""
PLACE = ["layer", "kind", "depth"]
PAIR = ["run_a", "run_b", "axis", "value_a", "value_b"]
LAST = ["value", "null", "null_std"]


def long_tables(results: Results) -> dict[str, pa.Table]:
    """Each table by its name, in the order of the analyses after `steps`; none where there is nothing in it."""
    parts: dict[str, list[pa.Table]] = {}
    for name, frame in sorted(results.analyses.items()):
        if not frame.empty:
            is_pair, has_metric = "run_a" in frame, "metric" in frame
            target = ("pairs" if is_pair else "metrics") if has_metric else name
            parts.setdefault(target, []).append(_table(results, name, frame))
    steps = {} if results.steps.empty else {"steps": _steps_table(results, results.steps)}
    return steps | {name: _united(tables) for name, tables in parts.items()}


def files(name: str, table: pa.Table) -> dict[str, bytes]:
    """A table as files, by their names; the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink, compression="zstd")
    found = {f"{name}.parquet": sink.getvalue().to_pybytes()}
    if name not in ("metrics", "pairs") or len(table) > MOST_ROWS:
        return found
    sink = pa.BufferOutputStream()
    words = [field.with_type(pa.string()) if pa.types.is_dictionary(field.type) else field for field in table.schema]
    csv.write_csv(table.cast(pa.schema(words)), sink, csv.WriteOptions(quoting_style="needed"))
    text = sink.getvalue().to_pybytes()
    if len(table) <= PLAIN_ROWS:
        return found | {f"{name}.csv": text}
    return found | {f"{name}.csv.gz": gzip.compress(text, compresslevel=1, mtime=0)}


def _steps_table(results: Results, frame: pd.DataFrame) -> pa.Table:
    columns = {"run_id": _words(frame["run_id"]), **_settings(results, frame["run_id"])}
    return pa.table(columns | {name: _arrow(frame[name]) for name in frame if name not in columns})


def _table(results: Results, name: str, frame: pd.DataFrame) -> pa.Table:
    runs = ["run_a", "run_b"] if "run_a" in frame else ["run_id"]
    columns: dict[str, Any] = {run: _words(frame[run]) for run in runs}
    for run in runs:
        prefix = {"run_a": "a.", "run_b": "b."}.get(run, "")
        columns |= {f"{prefix}{key}": column for key, column in _settings(results, frame[run]).items()}
    if "run_a" in frame:
        columns |= {column: _words(frame[column]) for column in PAIR[2:]}
    columns |= {column: _arrow(frame[column]) for column in PLACE}
    columns["analysis"] = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), len(frame)), [name])
    rest = [column for column in frame if column not in columns]
    for column in [*(c for c in rest if c not in LAST), *(c for c in LAST if c in rest)]:
        columns[column] = _arrow(frame[column])
    return pa.table(columns)


def _settings(results: Results, runs: pd.Series) -> dict[str, pa.Array]:
    """The settings of each row's run, and whether tables and figures compare it (`selected`)."""
    codes = runs.astype("category").cat
    rows = results.runs.index.get_indexer(list(codes.categories))[codes.codes]
    chosen = set(selected(results).run_ids)
    table = {key: _typed(list(results.runs[key])) for key in results.setting_keys}
    table["selected"] = pa.array([run in chosen for run in results.runs.index])
    return {key: values.take(pa.array(rows)) for key, values in table.items()}


def _typed(values: list[Any]) -> pa.Array:
    """Numbers where all are, else words; of all the sweep's runs, so that a key has one type in every table."""
    values = [None if value is None or value != value else value for value in values]
    present = [value for value in values if value is not None]
    if all(isinstance(value, bool) for value in present):
        return pa.array(values, pa.bool_())
    if all(map(is_number, present)):
        return pa.array(values, pa.int64() if all(isinstance(value, int) for value in present) else pa.float64())
    return pa.array([None if value is None else str(value) for value in values]).dictionary_encode()


def _words(column: pd.Series) -> pa.DictionaryArray:
    codes = column.astype("category").cat
    return pa.DictionaryArray.from_arrays(pa.array(codes.codes, pa.int32()), [str(word) for word in codes.categories])


def _arrow(column: pd.Series) -> pa.Array:
    return _words(column) if isinstance(column.dtype, pd.CategoricalDtype) else pa.Array.from_pandas(column)


def _united(tables: list[pa.Table]) -> pa.Table:
    """One table of all, `value` and what chance gives last; a column that one lacks is empty there."""
    whole = pa.concat_tables(tables, promote_options="permissive").unify_dictionaries()
    names = [name for name in whole.column_names if name not in LAST]
    return whole.select([*names, *(name for name in LAST if name in whole.column_names)]).replace_schema_metadata()
