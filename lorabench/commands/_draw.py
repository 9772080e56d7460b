"""What `analyze` and `report` share: everything that is drawn from the sweeps asked for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lorabench.commands._arguments import PLACE, PROCESSES, argument, as_json, hush_libraries, open_store, settle_place
from lorabench.config.decode import InputError
from lorabench.terminal.text import talk, tell

ARGUMENTS = [
    *PLACE, PROCESSES,
    argument("--check", "exit code 1 where a claim of a sweep does not hold", action="store_true"),
    argument("--json", "print the sweeps' files and the verdicts on their claims as JSON", action="store_true"),
]  # fmt: skip


def draw(arguments: argparse.Namespace, again: bool) -> int:
    """Everything that is drawn from the sweeps asked for: what is not up to date, or all of it `again`."""
    from lorabench.api.analyze import analyze_sweep
    from lorabench.report.freshness import find_sweeps

    settle_place(arguments)
    store = open_store(arguments.results)
    hush_libraries()
    code, told = 0, []
    for found in find_sweeps(store, arguments.sweep):
        try:
            made = analyze_sweep(store, found, workers=arguments.workers, again=again)
        except InputError as error:  # whatever is wrong with one sweep, the others are drawn
            for line in str(error).splitlines():
                talk(f"error: {line}")
            code = 2
            continue
        for name, text in made.errors.items():
            talk(f"error: {name}: {text}")
        code, files = max(code, int(not made.whole)), made.files
        for file in files if not arguments.json else ():
            tell(file)
        if files and (arguments.json or arguments.check):
            told.append(_told(files))
    if arguments.json:
        tell(as_json(told))
    fails = [claim["claim"] for sweep in told for claim in sweep["claims"] if claim["verdict"] == "does not hold"]
    for claim in fails if arguments.check else ():
        talk(f"does not hold: {claim}")
    return max(code, 1 if arguments.check and fails else 0)


def _told(files: list[Path]) -> dict[str, Any]:
    """A sweep's files and verdicts, as JSON has them."""
    from lorabench.report.claims import read

    folder = next(file.parent for file in files if file.name == "report.html")
    return {"sweep": folder.name, "files": [str(file) for file in files], "claims": read(folder / "tables")}
