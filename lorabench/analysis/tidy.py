"""Tidy tables as parquet files: made layer by layer, written whole or not at all, each with the key of its content."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from lorabench.config.decode import InputError

_KEY = b"lorabench_key"
_ROW_GROUP = 8192
"""Rows kept in memory before they are written: one of a layer's would cost more than its analysis."""


class Spool:
    """Tables one after another: in memory while they are small, else in `file`, which is open only while written to.

    So thousands of them can be filled at a time, and another process can go on with what one has filled.
    """

    def __init__(self, file: Path):
        self._file = file
        self._waiting: list[pa.Table] = []

    def add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        if sum(map(len, self._waiting)) >= _ROW_GROUP:
            self.save()

    def save(self) -> None:
        """Put all of it into the file."""
        with _clear_errors(self._file), open(self._file, "ab") as handle:
            for table in self._waiting:
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table)
                content = sink.getvalue()
                handle.write(len(content).to_bytes(8, "little") + content)
        self._waiting = []

    def tables(self) -> Iterator[pa.Table]:
        """Each table that was added, in order, here or by the process that has saved the file."""
        if self._file.exists():
            with _clear_errors(self._file), open(self._file, "rb") as handle:
                while size := handle.read(8):
                    yield pa.ipc.open_stream(handle.read(int.from_bytes(size, "little"))).read_all()
        yield from self._waiting

    def remove(self) -> None:
        self._waiting = []
        self._file.unlink(missing_ok=True)


def write_table(file: Path, key: str, tables: Iterable[pa.Table], temporary: Path | None = None) -> None:
    """Write tables of one set of columns as one file: whole or not at all, by way of `temporary`."""
    temporary = temporary or file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with _clear_errors(file), contextlib.ExitStack() as stack:
        file.parent.mkdir(parents=True, exist_ok=True)
        stack.callback(temporary.unlink, missing_ok=True)
        writer: parquet.ParquetWriter | None = None
        for group in _groups(tables):
            if writer is None:
                schema = group[0].schema.with_metadata({_KEY: key.encode()})
                writer = stack.enter_context(parquet.ParquetWriter(temporary, schema))
            cast = [table.cast(writer.schema) for table in group]
            writer.write_table(pa.concat_tables(cast).unify_dictionaries())
        assert writer is not None
        writer.close()
        os.replace(temporary, file)


def _groups(tables: Iterable[pa.Table]) -> Iterator[list[pa.Table]]:
    """Neighbouring tables with _ROW_GROUP rows or more between them; one empty table where there is none."""
    waiting: list[pa.Table] = []
    empty = True
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= _ROW_GROUP:
            yield waiting
            waiting, empty = [], False
    if waiting or empty:
        yield waiting or [to_table([], {})]


def read_table(file: Path, key: str) -> pa.Table | None:
    """The table, if there is one that was made with this key; one that cannot be read counts as none."""
    if not file.is_file():  # a pipe would be waited for without end
        return None
    with contextlib.suppress(OSError, pa.ArrowException), parquet.ParquetFile(file) as handle:
        if (handle.schema_arrow.metadata or {}).get(_KEY) == key.encode():
            return handle.read().replace_schema_metadata()
    return None


def read_keyed(file: Path) -> tuple[str, pa.Table] | None:
    """The key that a table was written with, and the table; None where there is none that can be read."""
    if not file.is_file():
        return None
    with contextlib.suppress(OSError, pa.ArrowException, UnicodeDecodeError), parquet.ParquetFile(file) as handle:
        return (handle.schema_arrow.metadata or {}).get(_KEY, b"").decode(), handle.read().replace_schema_metadata()
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


def concatenate(tables: list[pa.Table]) -> pa.Table:
    """Tables of like columns one after another, with one set of words for each column of words."""
    return pa.concat_tables(tables, promote_options="permissive").unify_dictionaries()


def to_frame(table: pa.Table, counts: list[int], before: dict[str, list[Any]]) -> pd.DataFrame:
    """A frame of `table`, of which subject i has `counts[i]` rows; `before[column][i]` stands in each of them.

    Words are categories, to stay small; so is what stands before, whatever its type.
    """
    frame = table.to_pandas(split_blocks=True, self_destruct=True)
    for place, (column, values) in enumerate(before.items()):
        frame.insert(place, column, _repeated(values, counts))
    return frame


def _repeated(values: list[Any], counts: list[int]) -> pd.Categorical:
    distinct = pd.Index(list(dict.fromkeys(values)), dtype=object)
    return pd.Categorical.from_codes(np.repeat(distinct.get_indexer(values), counts), distinct)


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
