"""List the methods, tasks, objectives, analyses and figures that a sweep file can name."""

from __future__ import annotations

import argparse

from lorabench.commands._arguments import JSON, argument, as_json
from lorabench.config import plugins
from lorabench.terminal.text import tell, text_table

ARGUMENTS = [argument("kind", "only these", nargs="?", choices=plugins.FOLDERS), JSON]


def main(arguments: argparse.Namespace) -> int:
    folders = [arguments.kind] if arguments.kind else list(plugins.FOLDERS)
    found = {folder: plugins.describe(folder) for folder in folders}
    rows = [
        {"kind": folder, "name": name, "description": text}
        for folder, entries in found.items()
        for name, text in entries.items()
    ]
    tell(as_json(found) if arguments.json else text_table(rows, ["kind", "name", "description"]))
    return 0
