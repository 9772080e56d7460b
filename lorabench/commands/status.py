"""Show how every run of a results folder stands, also while runs go on and wait on a cluster.

What the store says is joined with the queue of `lorabench submit` and with SLURM's (squeue, and sacct for what has
ended): `pending` runs show SLURM's reason, `lost` ones went away with their job and are submitted again by the next
`lorabench submit`. Of more than 60 runs a summary is shown, and a line for those that run or have not ended well.

`corrupt` is a run whose spec or record does not say what a run's does, or, with --verify, one whose files are no more
what they were when it ended. `--retry corrupt` of `run` and `submit` looks so too, and makes such runs again.

--watch ends when nothing waits or runs any more, with exit code 1 unless all is done. It prints only changes where
its output is no terminal.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from lorabench.commands._arguments import JSON, PLACE, argument, as_json, number, open_store, settle_place
from lorabench.terminal.text import count_statuses, talk, tell

if TYPE_CHECKING:
    from lorabench.cluster.run_states import Standing
    from lorabench.store.record import Status
    from lorabench.store.store import Store

WATCH_SECONDS = 10.0
ARGUMENTS = [
    *PLACE,
    argument(
        "--watch", f"look again every so many seconds (default: {WATCH_SECONDS:g})", type=number(float, 0.1),
        nargs="?", const=WATCH_SECONDS, metavar="SECONDS",
    ),
    argument(
        "--verify",
        "read every file that a run has left: `corrupt` where one is gone or has changed; exit code 1 if any run is",
        action="store_true",
    ),
    argument("--all", "a line for every run, however many they are", action="store_true"),
    JSON,
]  # fmt: skip


def main(arguments: argparse.Namespace) -> int:
    from lorabench.cluster.run_states import standings
    from lorabench.report.freshness import find_sweeps
    from lorabench.status.overview import MANY, not_begun, status_json, status_text
    from lorabench.store.record import Status

    settle_place(arguments)
    store = open_store(arguments.results)
    specs = find_sweeps(store, arguments.sweep)[0].read().runs if arguments.sweep else None
    once = cache(talk)  # what stays wrong from one look to the next is said once

    def look() -> list[Standing]:
        return standings(store, specs, tell=once, verify=arguments.verify)

    if arguments.watch is not None:
        return _watch(arguments, store, look)
    found = look()
    many = len(found) if arguments.all else MANY
    waiting = {} if arguments.sweep else not_begun(store, found)  # else they are among those found
    tell(as_json(status_json(store, found, waiting)) if arguments.json else status_text(store, found, many, waiting))
    return int(arguments.verify and any(standing.status == Status.CORRUPT for standing in found))


def _watch(arguments: argparse.Namespace, store: Store, look: Callable[[], list[Standing]]) -> int:
    from lorabench.status.overview import MANY, not_begun, reason, status_row, status_text
    from lorabench.status.pace import Usual
    from lorabench.status.watch import changes, redrawn, watch
    from lorabench.store.record import Status

    def line(standing: Standing, before: Status | None) -> str:
        if arguments.json:
            return json.dumps(json.loads(as_json(status_row(store, standing, Usual.of([])))))
        change = f"{before} -> {standing.status}" if before else str(standing.status)
        return "  ".join(filter(None, [time.strftime("%H:%M:%S"), standing.run_id, change, reason(standing)]))

    def begin(found: list[Standing]) -> str | None:
        counts = count_statuses(standing.state for standing in found)
        return None if arguments.json else f"{time.strftime('%H:%M:%S')}  {counts}"

    def draw(found: list[Standing]) -> str:
        lines = shutil.get_terminal_size().lines
        many = len(found) if arguments.all else min(MANY, max(5, lines - 5))
        return status_text(store, found, many, {} if arguments.sweep else not_begun(store, found))

    if sys.stdout.isatty() and not arguments.json:
        with redrawn(draw) as show:
            found = watch(look, arguments.watch, show)
    else:
        found = watch(look, arguments.watch, changes(line, begin))
    return 0 if all(standing.status == Status.DONE for standing in found) else 1
