"""What `analyze` and `report` share: everything that is drawn from the sweeps asked for."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.commands._arguments import PLACE, PROCESSES, argument, as_json, hush_libraries, open_store, settle_place
from lorabench.config.decode import InputError
from lorabench.terminal.text import talk, tell

if TYPE_CHECKING:
    from lorabench.report.freshness import SweepFile
    from lorabench.report.outputs import Report
    from lorabench.spec.sweep import Sweep
    from lorabench.store.store import Store


ARGUMENTS = [
    *PLACE, PROCESSES,
    argument("--check", "exit code 1 where a claim of a sweep does not hold", action="store_true"),
    argument("--json", "print the sweeps' files and the verdicts on their claims as JSON", action="store_true"),
]  # fmt: skip


def draw(arguments: argparse.Namespace, again: bool) -> int:
    """Everything that is drawn from the sweeps asked for: what is not up to date, or all of it `again`."""
    from lorabench.report.freshness import find_sweeps

    settle_place(arguments)
    store = open_store(arguments.results)
    hush_libraries()
    code, told = 0, []
    for found in find_sweeps(store, arguments.sweep):
        own, files = _draw(store, found, arguments.workers, again)
        code = max(code, own)
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


def _draw(store: Store, found: SweepFile, workers: int | None, again: bool) -> tuple[int, list[Path]]:
    """The exit code, and a sweep's files. Whatever is wrong with one sweep, the others are drawn."""
    files = None if again else found.up_to_date(store)
    try:
        report, whole = _write(store, found.read(), workers) if files is None else (None, True)
    except InputError as error:
        for line in str(error).splitlines():
            talk(f"error: {line}")
        return 2, []
    for name, text in report.errors.items() if report else ():
        talk(f"error: {name}: {text}")
    return 0 if whole else 1, (files or []) if report is None else report.files


def _write(store: Store, sweep: Sweep, workers: int | None) -> tuple[Report, bool]:
    """Analyze what is new, and write everything that is drawn from the sweep; whether nothing had to be left out.

    What is wrong with a run is told while it is analyzed.
    """
    from lorabench.analysis.analyze import analyze as analyze_runs
    from lorabench.report.freshness import analysis_key, remove_stamp, write_stamp
    from lorabench.report.outputs import write_report
    from lorabench.report.page import Attempts
    from lorabench.report.results import Results, load_results
    from lorabench.terminal.text import count_statuses

    key = analysis_key(store, sweep.text, [spec.id for spec in sweep.runs])
    states = list(store.states(list(sweep.runs)))
    if any(state.status != "done" for state in states):
        talk(f"{sweep.name}: {count_statuses(states)}; the tables show which cells are lacking")
    unread: dict[str, str] = {}
    attempt = Attempts()
    compute = partial(analyze_runs, workers=workers, states=states, unread=unread.update, broken=attempt.errors.update)
    results = attempt("analyses", lambda: load_results(store, sweep, compute, states))
    if not isinstance(results, Results):
        results = load_results(store, sweep, None, states)
    results = replace(results, unread=unread, broken=attempt.errors)
    report = write_report(results, store.root / sweep.name)
    whole = not (unread or report.errors)
    if whole:
        write_stamp(store, sweep, key, report.files)
    else:  # the next call looks again, and says so again
        remove_stamp(store, sweep)
    return report, whole
