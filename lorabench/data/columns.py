"""Which columns of rows are likely the ones that a task reads: by what they are called, and by what they hold.

For sweep files that `lorabench new` writes, and a person then reads; a run never guesses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from lorabench.data.rows_file import Row
from lorabench.data.values import find

MANY_CLASSES = 50
"""Different values of a column that holds no classes any more."""
_PLAIN = re.compile(r"[^{}\[\].:!]+")
"""Names that can stand in a template as they are."""

Holds = Callable[[Sequence[Any]], bool]
"""Whether the values of a column, none of them missing, are of a kind."""


def are_texts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def are_plain(values: Sequence[Any]) -> bool:
    """Texts, numbers or truth values."""
    return all(isinstance(value, (str, int, float)) for value in values)


def are_labels(values: Sequence[Any]) -> bool:
    """Fewer different ones than rows, and not many."""
    different = len(set(map(str, values))) if are_plain(values) else 0
    return 2 <= different <= min(MANY_CLASSES, max(2, len(values) // 2))


def are_numbers(values: Sequence[Any]) -> bool:
    return all(re.fullmatch(r"-?\d+(\.\d*)?([eE]-?\d+)?", str(value)) is not None for value in values)


def are_text_lists(values: Sequence[Any]) -> bool:
    return all(isinstance(value, list) and value and are_texts(value) for value in values)


def are_messages(values: Sequence[Any]) -> bool:
    """Lists of objects with the texts `role` and `content`."""
    return all(
        isinstance(value, list)
        and value
        and all(isinstance(each, dict) and are_texts([each.get("role"), each.get("content")]) for each in value)
        for value in values
    )


def columns(rows: Sequence[Row], holds: Holds) -> list[str]:
    """The columns whose values are of a kind, none of them missing; also those in an object (`choices.text`)."""
    names = dict.fromkeys(
        name
        for row in rows
        for key, value in row.items()
        for name in ([key] if not isinstance(value, dict) else [f"{key}.{inner}" for inner in value])
    )
    found = {name: [find(row, name) for row in rows] for name in names}
    return [name for name, values in found.items() if None not in values and holds(values)]


def without_header(rows: Sequence[Row]) -> list[str]:
    """Names for the columns of a table whose first line reads as a row: a number, or what its column holds below.

    `label` for the first that holds classes, `text`, else `column`, with its place for the others; none where the line
    is a header.
    """
    source = getattr(rows[0], "source", None)
    names = list(rows[0])
    below = {name: {str(row.get(name)) for row in rows} for name in names}
    if not (source and source.has_header) or not any(are_numbers([name]) or name in below[name] for name in names):
        return []
    found: list[str] = []
    for place, name in enumerate(names, 1):
        values = [row.get(name) for row in rows]
        what = "label" if are_labels(values) else "text" if are_texts(values) and not are_numbers(values) else "column"
        found.append(f"{what}_{place}" if what in found or what == "column" else what)
    return found


def called(names: Sequence[str], words: str) -> str | None:
    """The first of the names that is one of the words, in their order; else one that has such a word in it."""
    whole = [name for word in words.split() for name in names if name.lower() == word]
    parts = [name for word in words.split() for name in names if word in re.split(r"[\W_]+", name.lower())]
    return next(iter([*whole, *parts]), None)


def longest(rows: Sequence[Row], names: Sequence[str]) -> str | None:
    """The column with the longest texts."""
    return max(names, key=lambda name: sum(len(str(find(row, name))) for row in rows), default=None)


def plain(names: Sequence[str]) -> list[str]:
    """Those that can stand in a template as they are, or in an object's braces (`meta.q`)."""
    return [name for name in names if all(_PLAIN.fullmatch(part) for part in name.split("."))]


def numbered(names: Sequence[str]) -> list[str]:
    """The columns that are called alike but for a letter or number at the end: `A`, `B`, `C`; `ending0`, `ending1`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        match = re.fullmatch(r"(|.*[\W_])([A-Ha-h])|(.*\D)(\d)", name)
        if match:
            groups.setdefault(match[1] if match[2] else match[3], []).append(name)
    return max((sorted(group) for group in groups.values()), key=len, default=[])
