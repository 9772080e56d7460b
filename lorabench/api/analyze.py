"""`lorabench.analyze(results)`: analyze what the runs have learned, and write tables, figures and report.html."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lorabench.api.results import SweepResults, find

if TYPE_CHECKING:
    from lorabench.report.freshness import SweepFile
    from lorabench.report.results import Results
    from lorabench.report.typeset import Sheet
    from lorabench.spec.source import Source
    from lorabench.spec.sweep import Sweep
    from lorabench.store.store import Store


def analyze(
    results: str | os.PathLike[str] = "results",
    sweep: Source | None = None,
    *,
    workers: int | None = None,
    again: bool = False,
) -> SweepResults:
    """Analyze the ΔW of a sweep's runs, and write everything that is drawn from it.

        lorabench.analyze("results/quickstart").files

    `results` and `sweep` are those of `lorabench.results`; what is up to date is left as it is unless it is to be drawn
    `again`, and only what is new is computed, by so many `workers` (None: one a core where there is much). Raises
    `lorabench.InputError`; what raises while it is computed or drawn stands in `errors`, and the rest is made.
    """
    return analyze_sweep(*find(results, sweep), workers=workers, again=again)


def analyze_sweep(
    store: Store, found: Sweep | SweepFile, *, workers: int | None = None, again: bool = False
) -> SweepResults:
    """The same of a sweep that is found already, as `lorabench.api.results.find` gives it."""
    from lorabench.spec.sweep import Sweep

    made = SweepResults(store, found)
    files = None if again or isinstance(found, Sweep) else found.up_to_date(store)
    if files is not None:  # a sweep of thousands of runs is not even read
        made.files = files
    else:
        _write(store, made, workers)
    return made


def _write(store: Store, made: SweepResults, workers: int | None) -> None:
    """Analyze what is new, and write everything that is drawn from the sweep.

    What is wrong with a run is told while it is analyzed.
    """
    from lorabench.adapters.kept import kept_parts
    from lorabench.analysis.analyze import analyze as analyze_runs
    from lorabench.report.freshness import analysis_key, remove_stamp, write_stamp
    from lorabench.report.outputs import write_report
    from lorabench.report.page import Attempts
    from lorabench.report.results import Results, load_results
    from lorabench.terminal.text import count_statuses, talk

    sweep = made.sweep
    key = analysis_key(store, sweep.text, [spec.id for spec in sweep.runs])
    states = list(store.states(list(sweep.runs)))
    if any(state.status != "done" for state in states):
        talk(f"{sweep.name}: {count_statuses(states)}; the tables show which cells are lacking")
    attempt = Attempts()
    compute = partial(
        analyze_runs, workers=workers, states=states, unread=made.unread.update, broken=attempt.errors.update
    )
    results = attempt("analyses", lambda: load_results(store, sweep, compute, states))
    if not isinstance(results, Results):
        results = load_results(store, sweep, None, states)
    further = attempt("transfers", lambda: _moved(store, results, attempt.errors))
    kept = attempt("kept results", lambda: kept_parts(store, [spec.id for spec in sweep.runs]))
    made.analyzed = replace(results, unread=made.unread, broken=attempt.errors)
    sections, tables = kept if isinstance(kept, list) else (), further if isinstance(further, list) else ()
    report = write_report(made.analyzed, made.folder, sections, tables)
    made.files, made.errors = report.files, report.errors
    if made.whole:
        write_stamp(store, sweep, key, report.files)
    else:  # the next call looks again, and says so again
        remove_stamp(store, sweep)


def _moved(store: Store, results: Results, errors: dict[str, str]) -> list[Sheet]:
    """Tables of what [[transfer]] asks for, moved now where it is not yet; why some is not goes to the `errors`."""
    if not results.sweep.moves:
        return []
    from lorabench.adapters.moving.moved_sheets import moved_sheets
    from lorabench.adapters.moving.stage import move_runs
    from lorabench.terminal.text import talk

    moves = move_runs(store, results, "auto", talk)
    errors |= moves.errors
    return moved_sheets(results, moves)
