"""One data file -> rows, with nothing guessed: JSON by its own types, csv and tsv as text, parquet by its schema.

A row is a dict. A cell of csv or tsv is the text that stands there, so that `01000` keeps its zero; a value that JSON
or parquet has as null is None.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lorabench.config.decode import InputError
from lorabench.config.quote import show

Row = dict[str, Any]
SUFFIXES = [".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet"]
LONGEST_CELL = 2**31 - 1
"""Python's csv takes 131,072 characters a cell unless told otherwise."""


def kind(file: Path) -> str:
    """The suffix that says how to read it: `.csv` of `train.csv.gz`."""
    return file.with_suffix("").suffix if file.suffix in (".gz", ".xz") else file.suffix


def read_rows(file: Path, content: bytes, columns: str | None) -> list[Row]:
    """The rows of a file with this content; `columns` names those of a csv or tsv without a header line.

    InputError with the line where there is one.
    """
    if kind(file) not in SUFFIXES:
        raise InputError(f'task.data = "{file}": unknown kind "{kind(file)}". Choices: {", ".join(SUFFIXES)}')
    try:
        return _parse(kind(file), _unpacked(file, content), columns.split(",") if columns else None)
    except RecursionError:
        raise InputError(f'task.data = "{file}": cannot be read: it is nested too deeply') from None
    except (ValueError, OSError, EOFError, lzma.LZMAError, zlib.error, NotImplementedError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise InputError(f'task.data = "{file}": cannot be read: {reason}') from None


def _unpacked(file: Path, content: bytes) -> bytes:
    match file.suffix:
        case ".gz":
            return gzip.decompress(content)
        case ".xz":
            return lzma.decompress(content)
    return content


def _parse(suffix: str, content: bytes, columns: list[str] | None) -> list[Row]:
    if suffix == ".parquet":
        return _parquet(content)
    text = content.decode("utf-8-sig")
    match suffix:
        case ".txt":
            return [{"text": text.replace("\r\n", "\n").replace("\r", "\n")}] if text else []
        case ".jsonl":
            return list(_json_lines(text))
        case ".json":
            return _json_table(_json(text))
        case ".csv":
            return list(_table(_csv_lines(text), columns))
    return list(_table(_tsv_lines(text), columns))


def _parquet(content: bytes) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(io.BytesIO(content)).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(error) from None


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, no key of which stands in it twice: Python's reader would take the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"the key {show(twice)} stands twice in one object")
    return found


def _json_lines(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a text may hold other ends of lines
        if line.strip():
            try:
                yield _object(_json(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None


def _json_table(value: Any) -> list[Row]:
    """A list of objects, or an object of columns of one length (lists, or pandas' objects by row)."""
    if isinstance(value, list):
        return [_object(each) for each in value]
    columns = {
        name: list(column.values()) if isinstance(column, dict) else column for name, column in _object(value).items()
    }
    if not all(isinstance(column, list) for column in columns.values()):
        raise ValueError("must be a list of objects, or an object of columns")
    if len(set(map(len, columns.values()))) > 1:
        raise ValueError("its columns are not of one length")
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _object(value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"a row must be an object, not {type(value).__name__}")
    return value


Line = tuple[int, list[str]]
"""The number of a line, from 1, and its cells."""


def _csv_lines(text: str) -> Iterator[Line]:
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        number = 1
        try:
            for cells in reader:
                yield number, cells
                number = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"line {number}: {error}") from None
    finally:
        csv.field_size_limit(before)


def _tsv_lines(text: str) -> Iterator[Line]:
    """No quoting: a quotation mark in a sentence is text (GLUE's own files are written so)."""
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        yield number, line.split("\t") if line else []


def _table(lines: Iterable[Line], columns: list[str] | None) -> Iterator[Row]:
    """Rows by the header line, or by the names given. Lines without a character are no rows."""
    names = columns
    for number, cells in lines:
        if not cells:
            continue
        if names is None:
            names = cells
            _check_header(number, names)
            continue
        if len(cells) != len(names):
            source = "task.columns names" if columns else "the header has"
            raise ValueError(f"line {number}: {len(cells)} cells, and {source} {len(names)} ({_listed(names)})")
        yield dict(zip(names, cells, strict=True))


def _check_header(number: int, names: list[str]) -> None:
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ValueError(f"line {number}: the header has the column {show(twice[0])} twice")


def _listed(names: list[str]) -> str:
    text = ", ".join(names)
    return text if len(text) <= 80 else f"{text[:79]}…"
