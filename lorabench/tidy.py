"""Tidy tables as parquet files: written layer by layer, whole or not at all, each with the key of its content."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from lorabench.decode import InputError

_KEY = b"lorabench_key"
_ROW_GROUP = 8192
"""Rows kept in memory before they are written: one of a layer's would cost more than its analysis."""


class TableWriter:
    """`add` rows, then `commit`: only then the file is there. `abort` leaves what was there before."""

    def __init__(self, file: Path, key: str):
        self._file, self._key = file, key
        self._temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        self._writer: parquet.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []

    def add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        if sum(map(len, self._waiting)) >= _ROW_GROUP:
            self._flush()

    def commit(self) -> None:
        if self._writer is None and not self._waiting:
            self.add(to_table([], {}))
        writer = self._flush()
        with _clear_errors(self._file):
            writer.close()
            os.replace(self._temporary, self._file)

    def _flush(self) -> parquet.ParquetWriter:
        with _clear_errors(self._file):
            if self._writer is None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                schema = self._waiting[0].schema.with_metadata({_KEY: self._key.encode()})
                self._writer = parquet.ParquetWriter(self._temporary, schema)
            tables = [table.cast(self._writer.schema) for table in self._waiting]
            if tables:
                self._writer.write_table(pa.concat_tables(tables).unify_dictionaries())
            self._waiting = []
            return self._writer

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            if self._writer is not None:
                self._writer.close()
            self._temporary.unlink()


def read_table(file: Path, key: str) -> pa.Table | None:
    """The table, if there is one that was made with this key; one that cannot be read counts as none."""
    with contextlib.suppress(OSError, pa.ArrowInvalid), parquet.ParquetFile(file) as handle:
        if (handle.schema_arrow.metadata or {}).get(_KEY) == key.encode():
            return handle.read()
    return None


def to_table(rows: list[dict[str, Any]], before: dict[str, Any]) -> pa.Table:
    """Rows of one set of columns, after the columns `before`.

    A row may hold 1-D arrays of one length and stands for that many rows then; its other values are repeated.
    """
    sizes = [max((len(v) for v in row.values() if isinstance(v, np.ndarray)), default=1) for row in rows]
    columns = {key: constant(value, sum(sizes)) for key, value in before.items()}
    for key in rows[0] if rows else ():
        columns[key] = _column([row[key] for row in rows], sizes)
    return pa.table(columns)


def constant(value: Any, size: int) -> pa.Array:
    """A column of one value; whole numbers may be missing."""
    if isinstance(value, str):
        return pa.DictionaryArray.from_arrays(pa.array(np.zeros(size, np.int32)), [value])
    if isinstance(value, float):
        return pa.array(np.full(size, value))
    return pa.nulls(size, pa.int32()) if value is None else pa.array(np.full(size, value, np.int32))


def to_frame(parts: Iterable[tuple[dict[str, Any], pa.Table]], columns: list[str]) -> pd.DataFrame:
    """One frame of all tables, each after its own constant columns; strings are categories, to stay small.

    `columns` are what an empty frame has.
    """
    tables = [
        pa.table({key: constant(value, len(table)) for key, value in before.items()} | _columns(table))
        for before, table in parts
        if len(table)
    ]
    if not tables:
        return pd.DataFrame(columns=columns)
    whole = pa.concat_tables(tables, promote_options="permissive").unify_dictionaries()
    return whole.to_pandas(split_blocks=True, self_destruct=True)


def _columns(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    return dict(zip(table.column_names, table.columns, strict=True))


def _column(values: list[Any], sizes: list[int]) -> pa.Array:
    if isinstance(values[0], np.ndarray):
        return pa.array(np.concatenate(values))
    if isinstance(values[0], str):
        column = pa.array(values).dictionary_encode()
    else:
        column = pa.array(values, pa.int32() if all(isinstance(v, int) for v in values) else pa.float64())
    return column if sum(sizes) == len(values) else column.take(np.repeat(np.arange(len(values)), sizes))


@contextlib.contextmanager
def _clear_errors(file: Path) -> Any:
    try:
        yield
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error}") from None
