"""One data file -> rows, with nothing guessed: JSON by its own types, csv and tsv as text, parquet by its schema.

A row is a dict, and knows where it stands. A cell of csv or tsv is the text that stands there, so that `01000` keeps
its zero; a value that JSON or parquet has as null is None. A csv may quote its cells, a tsv does not.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabench.config.decode import InputError
from lorabench.config.quote import clip, show, show_path

Row = dict[str, Any]
SUFFIXES = [".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet"]
LONGEST_CELL = 2**31 - 1
"""Python's csv takes 131,072 characters a cell unless told otherwise."""
UNITS = {".txt": "", ".jsonl": "line", ".csv": "line", ".tsv": "line"}
"""What an editor counts in a file; of others, rows are counted."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What rows were read from, as messages call it: a file, or a split of a data set that is none of the user's."""

    name: str
    unit: str = "row"
    """What is counted in it; nothing where it is one row as a whole."""
    has_header: bool = False
    """Whether its columns are named by its first line."""
    folder: str = ""
    """That it lies in, as rows may name files beside it."""


class Placed(Row):
    """A row that knows where it stands."""

    __slots__ = ("number", "source")
    source: Source
    number: int
    """From 1; of a row of several lines that of the first."""


def placed(rows: Iterable[tuple[int, Row]], source: Source) -> list[Row]:
    """The rows, which are given with their numbers."""
    found: list[Row] = []
    for number, values in rows:
        row = Placed(values)
        row.source, row.number = source, number
        found.append(row)
    return found


def place(row: Row, number: int) -> str:
    """Where a row stands: `films.csv, line 61`; of one that was read from nowhere its `number` among those at hand."""
    if not isinstance(row, Placed):
        return f"row {number}"
    return f"{row.source.name}, {row.source.unit} {row.number}" if row.source.unit else row.source.name


def source_of(rows: Iterable[Row]) -> str:
    """What rows were read from: a file, or the first of several; nothing where it is not known."""
    names = dict.fromkeys(row.source.name for row in rows if isinstance(row, Placed))
    first = next(iter(names), "")
    return f"{first} and {len(names) - 1} more" if len(names) > 1 else first


def kind(file: Path) -> str:
    """The suffix that says how to read it: `.csv` of `train.csv.gz`."""
    return file.with_suffix("").suffix if file.suffix in (".gz", ".xz") else file.suffix


def read_rows(file: Path, content: bytes, columns: str | None, called: str = "") -> list[Row]:
    """The rows of a file with this content; `columns` names those of a csv or tsv without a header line.

    Where it is not `called` otherwise, messages name it by its path. InputError with the line where there is one.
    """
    where = f'task.data = "{show_path(file)}"'
    if kind(file) not in SUFFIXES:
        raise InputError(f"{where}: unknown kind {show(kind(file))}. Choices: {', '.join(SUFFIXES)}")
    header = kind(file) in (".csv", ".tsv") and not columns
    name, unit = called or show_path(file), UNITS.get(kind(file), "row")
    source = Source(name=name, unit=unit, has_header=header, folder=str(file.parent))
    try:
        rows = _parse(kind(file), _unpacked(file, content), columns.split(",") if columns else None)
        return placed(rows, source)
    except RecursionError:
        raise InputError(f"{where}: cannot be read: it is nested too deeply") from None
    except (ValueError, OSError, EOFError, lzma.LZMAError, zlib.error, NotImplementedError) as error:
        raise InputError(f"{where}: cannot be read: {clip(error, 300)}") from None


def _unpacked(file: Path, content: bytes) -> bytes:
    match file.suffix:
        case ".gz":
            return gzip.decompress(content)
        case ".xz":
            return lzma.decompress(content)
    return content


def _parse(suffix: str, content: bytes, columns: list[str] | None) -> Iterable[tuple[int, Row]]:
    """Rows with their numbers."""
    if suffix == ".parquet":
        return enumerate(_parquet(content), 1)
    text = _decoded(content)
    match suffix:
        case ".txt":
            return [(1, {"text": text.replace("\r\n", "\n").replace("\r", "\n")})] if text else []
        case ".jsonl":
            return _json_lines(text)
        case ".json":
            return enumerate(_json_table(_json(text)), 1)
        case ".csv":
            return _table(_csv_lines(text), columns)
    return _table(_tsv_lines(text), columns)


def _decoded(content: bytes) -> str:
    """The text of a file. ValueError with the first line that is no UTF-8, and what to do about it."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is UTF-16, and must be UTF-8: `iconv -f UTF-16 -t UTF-8 FILE > NEW` makes it so")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte, line = error.object[error.start], error.object.count(b"\n", 0, error.start) + 1
        hint = "save it as UTF-8 (of a file in Latin-1, `iconv -f LATIN1 -t UTF-8 FILE > NEW` makes one)"
        raise ValueError(f"line {line}: the byte 0x{byte:02x} is not valid UTF-8: {hint}") from None


def _parquet(content: bytes) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(io.BytesIO(content)).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(error) from None


def _json(text: str, line: int | None = None) -> Any:
    """What a text says that is a file, or a line of one. ValueError with the place of what is wrong."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        hint = ": a file with an object a line is named .jsonl" if line is None and error.msg == "Extra data" else ""
        raise ValueError(f"line {line or error.lineno}, column {error.colno}: {error.msg}{hint}") from None
    except ValueError as error:
        raise ValueError(f"line {line}: {error}" if line else error) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, no key of which stands in it twice: Python's reader would take the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"the key {show(twice)} stands twice in one object")
    return found


def _json_lines(text: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a text may hold other ends of lines
        if line.strip():
            yield number, _object(_json(line, number), f"line {number}")


def _json_table(value: Any) -> list[Row]:
    """A list of objects, or an object of columns of one length (lists, or pandas' objects by row)."""
    if isinstance(value, list):
        return [_object(each, f"row {number}") for number, each in enumerate(value, 1)]
    columns = _object(value, "the file")
    if columns and all(isinstance(column, dict) for column in columns.values()):
        columns = _by_row(columns)
    if not all(isinstance(column, list) for column in columns.values()):
        raise ValueError("must be a list of objects, or an object of columns")
    if len(set(map(len, columns.values()))) > 1:
        raise ValueError("its columns are not of one length")
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _by_row(columns: dict[str, dict[str, Any]]) -> dict[str, list[Any]]:
    """Columns whose values stand by the names of their rows, in any order, with these in the first one's."""
    first, rows = next(iter(columns.items()))
    for name, column in columns.items():
        if column.keys() != rows.keys():
            (row, *_) = [*rows.keys() ^ column.keys()]
            raise ValueError(f"row {show(row)} is in one of the columns {show(first)} and {show(name)} alone")
    return {name: [column[row] for row in rows] for name, column in columns.items()}


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, not {type(value).__name__}")
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


def _table(lines: Iterable[Line], columns: list[str] | None) -> Iterator[tuple[int, Row]]:
    """Rows by the header line, or by the names given. Lines without a character are no rows."""
    names = columns
    if names:
        _check_names("task.columns", names)
    for number, cells in lines:
        if not cells:
            continue
        if names is None:
            names = cells
            _check_names(f"line {number}: the header", names)
            continue
        if len(cells) != len(names):
            source = "task.columns names" if columns else "the header has"
            hint = "; a tsv has no quotes" if any(cell.startswith('"') for cell in cells) else ""
            raise ValueError(f"line {number}: {len(cells)} cells, and {source} {len(names)} ({_listed(names)}){hint}")
        yield number, dict(zip(names, cells, strict=True))


def _check_names(where: str, names: list[str]) -> None:
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ValueError(f"{where} has the column {show(twice[0])} twice")


def _listed(names: list[str]) -> str:
    return clip(", ".join(names))
