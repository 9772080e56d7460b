"""What `analyze` and `report` share: everything that is drawn from the sweeps asked for."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lorabench.commands._arguments import hush_libraries, open_store
from lorabench.config.decode import InputError
from lorabench.terminal.text import talk, tell

if TYPE_CHECKING:
    from lorabench.report.freshness import SweepFile
    from lorabench.report.outputs import Report
    from lorabench.spec.sweep import Sweep
    from lorabench.store.store import Store


def draw(arguments: argparse.Namespace, again: bool) -> int:
    """Everything that is drawn from the sweeps asked for: what is not up to date, or all of it `again`."""
    from lorabench.report.freshness import find_sweeps

    store = open_store(arguments.results)
    hush_libraries()
    return max([_draw(store, found, arguments.workers, again) for found in find_sweeps(store, arguments.sweep)])


def _draw(store: Store, found: SweepFile, workers: int | None, again: bool) -> int:
    """Prints a sweep's files; the exit code. Whatever is wrong with one sweep, the others are drawn."""
    files = None if again else found.up_to_date(store)
    try:
        report, whole = _write(store, found.read(), workers) if files is None else (None, True)
    except InputError as error:
        for line in str(error).splitlines():
            talk(f"error: {line}")
        return 2
    for name, text in report.errors.items() if report else ():
        talk(f"error: {name}: {text}")
    for file in (files or []) if report is None else report.files:
        tell(file)
    return 0 if whole else 1


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
