"""What `analyze` and `report` share: everything that is drawn from the sweeps asked for."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorabench.commands._arguments import hush_libraries, open_store
from lorabench.terminal import talk, tell

if TYPE_CHECKING:
    from lorabench.record import Store
    from lorabench.sweep import Sweep


def draw(arguments: argparse.Namespace, again: bool) -> int:
    """Everything that is drawn from the sweeps asked for: what is not up to date, or all of it `again`."""
    from lorabench.share import WorkerFailed
    from lorabench.stamp import find_sweeps

    store = open_store(arguments.results)
    hush_libraries()
    code = 0
    for found in find_sweeps(store, arguments.sweep):
        files = None if again else found.up_to_date(store)
        try:
            if files is None:
                files, unread = _write(store, found.read(), arguments.workers)
                code = 1 if unread else code
        except WorkerFailed as error:
            for line in str(error).splitlines():
                talk(f"error: {line}")
            return 1
        for file in files:
            tell(file)
    return code


def _write(store: Store, sweep: Sweep, workers: int | None) -> tuple[list[Path], dict[str, str]]:
    """Analyze what is new, and write everything that is drawn from the sweep; the files, and what could not be read."""
    from lorabench.analyze import analyze as analyze_runs
    from lorabench.report import write_report
    from lorabench.results import load_results
    from lorabench.stamp import analysis_key, write_stamp
    from lorabench.terminal import count_statuses

    key = analysis_key(store, sweep.text, [spec.id for spec in sweep.runs])
    states = list(store.states(list(sweep.runs)))
    if any(state.status != "done" for state in states):
        talk(f"{sweep.name}: {count_statuses(states)}; the tables show which cells are lacking")
    unread: dict[str, str] = {}
    compute = partial(analyze_runs, workers=workers, states=states, unread=unread.update)
    results = replace(load_results(store, sweep, compute, states), unread=unread)
    files = write_report(results, store.root / sweep.name)
    if not unread:  # else the next call looks again, and says so again
        write_stamp(store, sweep, key, files)
    return files, unread
