"""Tidy tables, made layer by layer; and as parquet files, written whole or not at all, with a key."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from lorabench.config.decode import InputError

KEY = b"lorabench_key"
_ROW_GROUP = 8192
"""Rows kept in memory before they are written: one of a layer's would cost more than its analysis."""


Rows = list[dict[str, Any]]
"""Of one set of columns, as an analysis gives them of a layer."""


class Spool:
    """Rows one after another: in memory while they are few, else in `file`, which is open only while written to.

    So thousands of them can be filled at a time, and another process can go on with what one has filled.
    """

    def __init__(self, file: Path):
        self._file = file
        self._waiting: list[tuple[Rows, dict[str, Any]]] = []
        self._size = 0

    def add(self, rows: Rows, before: dict[str, Any]) -> None:
        """Rows, after the columns `before`; see `to_table`."""
        self._waiting.append((rows, before))
        self._size += sum(_sizes(rows))
        if self._size >= _ROW_GROUP:
            self.save()

    def save(self) -> None:
        """Put all of it into the file."""
        append_tables(self._file, _tables_of(self._waiting))
        self._waiting, self._size = [], 0

    def tables(self) -> Iterator[pa.Table]:
        """All that was added, in order, here or by the process that has saved the file."""
        yield from appended_tables(self._file)
        yield from _tables_of(self._waiting)

    def remove(self) -> None:
        self._waiting, self._size = [], 0
        self._file.unlink(missing_ok=True)


def append_tables(file: Path, tables: Iterable[pa.Table]) -> None:
    """Put tables behind those in a file of `appended_tables`, in a thirtieth of the time that parquet takes."""
    with clear_errors(file), open(file, "ab") as handle:
        for table in tables:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            content = sink.getvalue()
            handle.write(len(content).to_bytes(8, "little") + content)


def appended_tables(file: Path) -> Iterator[pa.Table]:
    """What `append_tables` has put there, in order; nothing where there is no file."""
    if file.exists():
        with clear_errors(file), open(file, "rb") as handle:
            while size := handle.read(8):
                yield pa.ipc.open_stream(handle.read(int.from_bytes(size, "little"))).read_all()


def write_table(file: Path, key: str, table: pa.Table) -> None:
    """Write a table with its key: whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with clear_errors(file), contextlib.ExitStack() as stack:
        file.parent.mkdir(parents=True, exist_ok=True)
        stack.callback(temporary.unlink, missing_ok=True)
        parquet.write_table(table.replace_schema_metadata({KEY: key.encode()}), temporary, write_statistics=False)
        os.replace(temporary, file)


def read_table(file: Path, key: str) -> pa.Table | None:
    """The table, if there is one that was made with this key; one that cannot be read counts as none."""
    if not file.is_file():  # a pipe would be waited for without end
        return None
    with contextlib.suppress(OSError, pa.ArrowException), parquet.ParquetFile(file) as handle:
        if (handle.schema_arrow.metadata or {}).get(KEY) == key.encode():
            return handle.read().replace_schema_metadata()
    return None


def read_keyed(file: Path) -> tuple[str, pa.Table] | None:
    """The key that a table was written with, and the table; None where there is none that can be read."""
    if not file.is_file():
        return None
    with contextlib.suppress(OSError, pa.ArrowException, UnicodeDecodeError), parquet.ParquetFile(file) as handle:
        return (handle.schema_arrow.metadata or {}).get(KEY, b"").decode(), handle.read().replace_schema_metadata()
    return None


def to_table(rows: Rows, before: dict[str, Any]) -> pa.Table:
    """Rows of one set of columns, after the columns `before`.

    A row may hold 1-D arrays of one length and stands for that many rows then; its other values are repeated.
    """
    return _joined([(rows, before)])


def _tables_of(blocks: list[tuple[Rows, dict[str, Any]]]) -> Iterator[pa.Table]:
    """A table of all neighbours of one form: to make a table takes as long as many an analysis of a layer."""
    for _, alike in itertools.groupby(blocks, key=_form):
        yield _joined([*alike])


def _form(block: tuple[Rows, dict[str, Any]]) -> list[tuple[str, bool]]:
    rows, before = block
    words = [(key, isinstance(value, str)) for key, value in before.items()]
    return words + [(key, isinstance(value, np.ndarray)) for key, value in rows[0].items()]


def _joined(blocks: list[tuple[Rows, dict[str, Any]]]) -> pa.Table:
    """Of blocks of one form, each after its own columns."""
    sizes = [_sizes(rows) for rows, _ in blocks]
    lengths = [sum(each) for each in sizes]
    columns = {key: repeated([before[key] for _, before in blocks], lengths) for key in blocks[0][1]}
    rows, all_sizes = [row for each, _ in blocks for row in each], [size for each in sizes for size in each]
    for key in rows[0] if rows else ():
        columns[key] = _column([row[key] for row in rows], all_sizes)
    return pa.table(columns)


def _sizes(rows: Rows) -> list[int]:
    """How many rows each stands for."""
    first = rows[0] if rows else {}
    arrays = next((key for key, value in first.items() if isinstance(value, np.ndarray)), None)
    return [1 if arrays is None else len(row[arrays]) for row in rows]


def repeated(values: list[Any], sizes: list[int]) -> pa.Array:
    """A column of values of one type, each so many times; whole numbers may be missing."""
    if isinstance(values[0], str):
        words = [*dict.fromkeys(values)]
        places = np.repeat(np.array([words.index(value) for value in values], np.int32), sizes)
        return pa.DictionaryArray.from_arrays(pa.array(places), words)
    if isinstance(values[0], float):
        return pa.array(np.repeat(np.array(values), sizes))
    if any(value is None for value in values):
        return pa.array(values, pa.int32()).take(np.repeat(np.arange(len(values)), sizes))
    return pa.array(np.repeat(np.array(values, np.int32), sizes))


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
def clear_errors(file: Path) -> Any:
    try:
        yield
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error}") from None
