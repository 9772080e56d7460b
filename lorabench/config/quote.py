"""Values as messages show them: in one line of printable characters, and short, whatever they are."""

from __future__ import annotations

import json
import re
import traceback
from pathlib import Path
from typing import Any

LENGTH = 80
"""Characters of a quoted value."""
PATH = 160
"""Characters of a path, which one wants to copy."""
LINE = 1000
"""Characters of a message as a whole, which may list many choices."""


def show(value: Any, length: int = LENGTH) -> str:
    """A value as it stands in a TOML file; only its beginning where that is long."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, ValueError, TypeError):  # nested too deep, a number of thousands of digits, strange keys
        text = f"<{type(value).__name__}>"
    return clip(text, length)


def counted(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def blame(error: BaseException) -> str:
    """An error that is a mistake of the program, in one line: what was raised, and where."""
    place = next(reversed(traceback.extract_tb(error.__traceback__)), None)
    where = f" ({Path(place.filename).name}, line {place.lineno})" if place else ""
    return f"{type(error).__name__}: {clip(error, 4 * LENGTH)}{where}"


def clip(text: object, length: int = LENGTH) -> str:
    """A text in one line, at most so long."""
    line = printable(" ".join(str(text)[: 4 * length].split()))
    return line if len(line) <= length else f"{line[: length - 1]}…"


def show_path(path: object) -> str:
    """A path in one line; of a long one its end."""
    text = printable(str(path)).replace("\n", "\\n")
    return text if len(text) <= PATH else f"…{text[1 - PATH :]}"


def message(text: str, length: int = LINE) -> str:
    """A message in one line, whatever was put into it: bounded, and so is each word of it. Both ends stay."""
    text = printable(text).replace("\n", "\\n")
    return _shortened(re.sub(rf"\S{{{PATH + 1},}}", lambda word: _shortened(word[0], PATH), text), length)


def _shortened(text: str, length: int) -> str:
    end = length // 3
    return text if len(text) <= length else f"{text[: length - end - 1]}…{text[-end:]}"


def printable(text: str) -> str:
    """The same text, with escapes for what a terminal would obey, or could not print: `\\x1b`, `\\ud800`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
