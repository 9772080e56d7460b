"""List the methods, tasks, objectives, optimizers, analyses and figures that a sweep file can name, or show one.

Of one, by its name: its fields with types, defaults and meaning, and a block to paste into a sweep file. `measures` are
what tables, claims and figures can show: of a run's record, and of ΔW.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from lorabench.commands._arguments import JSON, argument, as_json
from lorabench.config import plugins
from lorabench.config.decode import InputError
from lorabench.terminal.text import tell, text_table

ARGUMENTS = [
    argument(
        "what", f"only these ({', '.join(plugins.FOLDERS)}; measures), or the name of one", nargs="?",
        metavar="KIND|NAME",
    ),
    JSON,
]  # fmt: skip
MEASURES = "measures"


def main(arguments: argparse.Namespace) -> int:
    if arguments.what == MEASURES:
        return _measures(arguments.json)
    if arguments.what is not None and arguments.what not in plugins.FOLDERS:
        return _show(arguments.what, arguments.json)
    folders = [arguments.what] if arguments.what else list(plugins.FOLDERS)
    found = {folder: plugins.describe(folder) for folder in folders}
    rows = [
        {"kind": folder, "name": name, "description": text}
        for folder, entries in found.items()
        for name, text in entries.items()
    ]
    tell(as_json(found) if arguments.json else text_table(rows, ["kind", "name", "description"]))
    return 0


def _measures(json: bool) -> int:
    from lorabench.spec.known import known_measures

    found = {name: asdict(measure) for name, measure in known_measures().items()}
    better = {True: "more", False: "less", None: ""}
    rows = [
        {"name": name, "unit": each["unit"], "better": better[each["higher_is_better"]], "description": each["text"]}
        for name, each in found.items()
    ]
    tell(as_json(found) if json else text_table(rows, ["name", "unit", "better", "description"]))
    return 0


def _show(name: str, json: bool) -> int:
    """All plug-ins of that name: `dynamics` is an analysis, and a figure."""
    known = sorted({name for folder in plugins.FOLDERS for name in plugins.names(folder)})
    if name not in known:
        raise InputError(plugins.unknown("kind or name", name, [*plugins.FOLDERS, MEASURES, *known]))
    from lorabench.spec import described

    found = described.find(name)
    tell(as_json([asdict(each) for each in found]) if json else "\n\n\n".join(map(described.text, found)))
    return 0
