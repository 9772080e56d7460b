"""What `analyze` and `report` share: everything that is drawn from the sweeps asked for."""

from __future__ import annotations

import argparse
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
    for found in find_sweeps(store, arguments.sweep):
        files = None if again else found.up_to_date(store)
        try:
            files = _write(store, found.read(), arguments.workers) if files is None else files
        except WorkerFailed as error:
            for line in str(error).splitlines():
                talk(f"error: {line}")
            return 1
        for file in files:
            tell(file)
    return 0


def _write(store: Store, sweep: Sweep, workers: int | None) -> list[Path]:
    """Analyze what is new, and write everything that is drawn from the sweep."""
    from lorabench.analyze import analyze as analyze_runs
    from lorabench.report import write_report
    from lorabench.results import load_results
    from lorabench.stamp import analysis_key, write_stamp
    from lorabench.terminal import count_statuses

    key = analysis_key(store, sweep.text, [spec.id for spec in sweep.runs])
    states = list(store.states(list(sweep.runs)))
    if any(state.status != "done" for state in states):
        talk(f"{sweep.name}: {count_statuses(states)}; the tables show which cells are lacking")
    compute = partial(analyze_runs, workers=workers, states=states)
    files = write_report(load_results(store, sweep, compute, states), store.root / sweep.name)
    write_stamp(store, sweep, key, files)
    return files
