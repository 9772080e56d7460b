"""What a row holds for a task: texts, labels, scores, templates, and the one rule for what is missing.

**A value is missing** where it is null or NaN, or where the row has no such column. A label or score is missing also
where it is empty text, and where it is -1 as SNLI and GLUE write it: in a test split of which no row has another
value, and beside the classes 0, 1, 2, …. This holds for every format, split and task:

- A missing text, label or score is refused, with its row and column, in every split. An empty text is a text.
- A test split without any label or score (all missing, or no such column) counts as none.
- Rows with a label that `unlabelled` names, and then those with a missing one, are left out of every split.

A column is the one of exactly that name; else dots lead into nested values (`meta.q`: the value q of the object meta).
What is wrong is told with its place in the file that it stands in, whichever split its row has come to.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Iterable, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any

from lorabench.config.decode import InputError
from lorabench.config.quote import clip, show
from lorabench.data.rows_file import Placed, Row, place, source_of

PLAIN = (str, bool, int, float, Decimal, date, time)
"""Types that are written as one text. A list, an object or bytes is none."""

HEADER = ". These are the first line; where that is no header, name the columns by task.columns (any task but text)"


def find(row: Row, column: str) -> Any:
    """The value of a column, None where it is missing."""
    value: Any = row.get(column)
    if column not in row and "." in column:
        value = row
        for part in column.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    return None if isinstance(value, float) and math.isnan(value) else value


def check_column(rows: Sequence[Row], key: str, column: str) -> None:
    """InputError if no row has such a column."""
    if rows and not has_column(rows, column):
        raise InputError(f"{key} = {show(column)}: {_no_column(rows)}")


def has_column(rows: Iterable[Row], column: str) -> bool:
    return any(column in row or find(row, column) is not None for row in rows)


def texts(rows: Sequence[Row], key: str, column: str) -> list[str]:
    """The texts of a column; numbers as they are written. InputError where one is missing, or no text."""
    check_column(rows, key, column)
    key = f"{key} = {show(column)}"
    return [_text(find(row, column), key, row, number) for number, row in enumerate(rows, 1)]


def lists(rows: Sequence[Row], key: str, column: str) -> list[list[str]]:
    """The lists of texts of a column. InputError where one is missing, or no such list."""
    check_column(rows, key, column)
    key, found = f"{key} = {show(column)}", []
    for number, row in enumerate(rows, 1):
        value = find(row, column)
        if value is not None and not isinstance(value, list):
            raise InputError(f"{key}: {place(row, number)} is a {type(value).__name__}, and no list: {shown(value)}")
        items = [None] if value is None else value
        found.append([_text(item, key, row, number) for item in items])
    return found


def _text(value: Any, key: str, row: Row, number: int) -> str:
    if value is None:
        raise InputError(f"{key}: {place(row, number)} has no value")
    if not isinstance(value, PLAIN):
        raise InputError(f"{key}: {place(row, number)} is a {type(value).__name__}, and no text: {shown(value)}")
    text = str(value)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{key}: {place(row, number)} is no valid Unicode: {shown(value)}")
    return text


def shown(value: Any) -> str:
    """A value of a row for a message, as Python has it; only its beginning where that is long."""
    return clip(f'"{repr(value)[1:-1]}"' if isinstance(value, str) else repr(value))


def labels(rows: Sequence[Row], key: str, column: str) -> list[str | None]:
    """The labels of a column as they are written, None where one is missing; -1 is as it stands.

    InputError where one is a list or the like.
    """
    key = f"{key} = {show(column)}"
    found = [(number, row, find(row, column)) for number, row in enumerate(rows, 1)]
    written = [None if value is None else _text(value, key, row, number).strip() for number, row, value in found]
    return [text or None for text in written]


def as_class(label: str) -> str:
    """One way of writing a label: 0, "0" and 0.0 are one class. `01` is another than `1`."""
    whole = re.fullmatch(r"-?(0|[1-9][0-9]*)\.0*", label)
    if not whole:
        return label
    return whole[1] if whole[1] == "0" else label.partition(".")[0]


def in_order(classes: Iterable[str]) -> list[str]:
    """Whole numbers by size, anything else by the alphabet."""
    found = set(classes)
    is_whole = all(re.fullmatch(r"-?(0|[1-9][0-9]{0,18})", name) for name in found)
    return sorted(found, key=int) if is_whole else sorted(found)


def number(label: str) -> float | None:
    """The finite number that a label is, None where it is none."""
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in label else None


def are_scores(written: Iterable[str]) -> bool:
    """Whether labels are scores on a scale, and no classes.

    They are where all are numbers and one has a fraction, or where all have a decimal point and more than two differ.
    """
    found = set(written)
    values = {number(label) for label in found}
    if None in values:
        return False
    has_fraction = any(value is not None and not value.is_integer() for value in values)
    return has_fraction or (len(values) > 2 and all("." in label for label in found))


class Template(string.Formatter):
    """A text with column names in braces; with `:` and `!` as Python's format has them, `[0]` for a list's item."""

    def __init__(self, key: str, template: str):
        self.key, self.template = key, template
        self.where = f"{key} = {shown(template)}"

    def problems(self, rows: Sequence[Row]) -> list[str]:
        """That no column is named, and every row would have the same text."""
        try:
            named = any(field is not None for _, field, _, _ in self.parse(self.template))
        except ValueError:  # no template, as `fill` says
            return []
        if named:
            return []
        what = self.key.removeprefix("task.")
        return [f"{self.where}: names no column in braces: every {what} would be the same. Choices: {_columns(rows)}"]

    def fill(self, rows: Sequence[Row]) -> list[str]:
        """A text for each row. InputError with its place and the column where one is missing or no text."""
        return [self._filled(number, row, rows) for number, row in enumerate(rows, 1)]

    def _filled(self, number: int, row: Row, rows: Sequence[Row]) -> str:
        try:
            text = self.vformat(self.template, (), row)
        except KeyError as error:
            raise self._missing(error.args[0], row, number, rows) from None
        except (ValueError, IndexError, TypeError, OverflowError, MemoryError) as error:
            raise InputError(f"{self.where}: {place(row, number)}: {clip(error) or type(error).__name__}") from None
        return _text(text, self.where, row, number)

    def _missing(self, column: str, row: Row, number: int, rows: Sequence[Row]) -> InputError:
        head, _, index = column.partition("[")
        if index and isinstance(items := find(row, head), list):
            has = f"{place(row, number)} has {len(items)} items in {shown(head)}"
            return InputError(f"{self.where}: {has}, counted from 0, and no {shown(column)}")
        if any(column in each or _reached(each, column) is not None for each in rows):
            return InputError(f"{self.where}: {place(row, number)} has no value in {shown(column)}")
        return InputError(f"{self.where}: {_no_column(rows, shown(column))}")

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        value = _reached(kwargs, field_name)
        if value is None:
            raise KeyError(field_name)
        return value, field_name

    def format_field(self, value: Any, format_spec: str) -> Any:
        if not isinstance(value, PLAIN):
            raise ValueError(f"a {type(value).__name__} is no text: {shown(value)}")
        return super().format_field(value, format_spec)


def _reached(row: Row, field: str) -> Any:
    """The value of a template's field, None where it is missing."""
    if field in row or "[" not in field:
        return find(row, field)
    head, *indices = re.split(r"\[([^\[\]]*)\]", field)
    value = find(row, head)
    for part in filter(None, indices):
        if isinstance(value, dict):
            value = find(value, part.removeprefix("."))
        elif isinstance(value, list) and re.fullmatch(r"[0-9]{1,9}", part) and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _no_column(rows: Sequence[Row], column: str = "") -> str:
    """That there is no such column, and which there are: in bounded length, and such as can be printed."""
    source = source_of(rows)
    no_such = f"no such column{f' in {source}' if source else ''}{f': {column}' if column else ''}"
    return f"{no_such}. Choices: {_columns(rows)}"


def _columns(rows: Sequence[Row]) -> str:
    names = dict.fromkeys(name for row in rows for name in row)
    choices = ", ".join(name if name.isprintable() and name == name.strip() != "" else shown(name) for name in names)
    headed = any(isinstance(row, Placed) and row.source.has_header for row in rows)
    return clip(choices, 300) + (HEADER if headed else "")
