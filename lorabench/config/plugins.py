"""Plug-ins: one file each; the file's name is the name in the sweep file and the value in the tables.

A plug-in folder (`methods`, `tasks`, `objectives`, `optimizers`, `analyses`, `figures`) is a package of small files.
Each file defines one dataclass and its smallest instance, `EXAMPLE`, which the tests run.
"""

from __future__ import annotations

import ast
import difflib
import importlib
from functools import cache
from pathlib import Path
from typing import ClassVar

from lorabench.config import other_words
from lorabench.config.quote import clip

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = ("methods", "tasks", "objectives", "optimizers", "analyses", "figures")
WITHIN = {"objectives": "training", "optimizers": "training", "figures": "report", "readers": "updates",
          "exporters": "store"}  # fmt: skip
"""Registries that stand inside a wing."""
MOST_LISTED, NUM_NEAREST = 900, 20
"""Characters of choices that are all listed, for a message has bounds; of more than that, the nearest so many."""


def _place(folder: str) -> tuple[str, ...]:
    return (WITHIN[folder], folder) if folder in WITHIN else (folder,)


class Plugin:
    """What lives in a plug-in folder. `folder` and `in_sweep` are set by the base class of that folder."""

    folder: ClassVar[str]
    in_sweep: ClassVar[tuple[str, str]]
    """The section of a sweep file that it stands in, and the key there: `("[[grid]]", "method")`."""
    by_name: ClassVar[bool] = False
    """Whether its name alone may stand for it, with the defaults."""

    @property
    def name(self) -> str:
        return plugin_name(type(self))


def plugin_name(cls: type) -> str:
    return cls.__module__.rpartition(".")[2]


def names(folder: str) -> list[str]:
    """The plug-ins of a folder, sorted; reads the directory only, and once, and imports nothing."""
    return [*_names(folder)]


@cache
def _names(folder: str) -> tuple[str, ...]:
    files = PACKAGE.joinpath(*_place(folder)).glob("*.py")
    return tuple(sorted(file.stem for file in files if not file.stem.startswith("_")))


def describe(folder: str) -> dict[str, str]:
    """Name -> first line of the plug-in's docstring, without importing it."""
    root = PACKAGE.joinpath(*_place(folder))
    return {name: _first_line((root / f"{name}.py").read_text("utf-8")) for name in names(folder)}


def _first_line(code: str) -> str:
    """Of a module's docstring, after which nothing is parsed: of all the plug-ins that would take half of `list`."""
    before, quotes, rest = code.partition('"""')
    text, end, _ = rest.partition('"""')
    tree = ast.parse(before + quotes + text + end)
    return (ast.get_docstring(tree) or "").partition("\n")[0]


@cache
def example(folder: str, name: str) -> Plugin:
    """The smallest instance of a plug-in; KeyError with the valid names and the closest if there is none."""
    if name not in names(folder):
        raise KeyError(unknown(f"{folder[:-1] if folder != 'analyses' else 'analysis'}", name, names(folder)))
    return importlib.import_module(".".join(("lorabench", *_place(folder), name))).EXAMPLE


def plugin_class(folder: str, name: str) -> type:
    return type(example(folder, name))


def unknown(what: str, given: object, choices: list[str]) -> str:
    """`unknown method 'lorra'. Did you mean 'lora'? Choices: full, lora`; by other tools' words too."""
    text = clip(given)
    tables = {
        "key": other_words.WORDS,
        "measure": other_words.WORDS,
        "method": other_words.METHODS,
        "optimizer": other_words.OPTIMIZERS,
    }
    theirs = other_words.hint(text, tables.get(what, {}))
    close = difflib.get_close_matches(text, choices, n=1)
    hint = f" {theirs}" if theirs else f" Did you mean '{close[0]}'?" if close else ""
    if len(", ".join(choices)) > MOST_LISTED:
        near = sorted(choices, key=lambda choice: -difflib.SequenceMatcher(None, text, choice).ratio())[:NUM_NEAREST]
        return f"unknown {what} '{text}'.{hint} Choices: {', '.join(near)}, … and {len(choices) - len(near)} more"
    return f"unknown {what} '{text}'.{hint} Choices: {', '.join(choices)}"
