"""Values as messages show them: in one line of printable characters, and short, whatever they are."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

LENGTH = 80
"""Characters of a quoted value."""
LINE = 2000
"""Characters of a problem as a whole, which may list many choices."""


def show(value: Any, length: int = LENGTH) -> str:
    """A value as it stands in a TOML file; only its beginning where that is long."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, ValueError, TypeError):  # nested too deep, a number of thousands of digits, strange keys
        text = f"<{type(value).__name__}>"
    return clip(text, length)


def blame(error: BaseException) -> str:
    """An error that is a mistake of the program, in one line: what was raised, and where."""
    place = next(reversed(traceback.extract_tb(error.__traceback__)), None)
    where = f" ({Path(place.filename).name}, line {place.lineno})" if place else ""
    return f"{type(error).__name__}: {clip(error, 4 * LENGTH)}{where}"


def clip(text: object, length: int = LENGTH) -> str:
    """A text in one line, at most so long."""
    line = printable(" ".join(str(text)[: 4 * length].split()))
    return line if len(line) <= length else f"{line[: length - 1]}…"


def printable(text: str) -> str:
    """The same text, with escapes for what a terminal would obey, or could not print: `\\x1b`, `\\ud800`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
