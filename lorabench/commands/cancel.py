"""Cancel what waits or runs of a sweep, or one run.

Jobs on the cluster, or of this machine, that hold nothing else are cancelled; of a job that goes on with other runs
only these runs are. What is running writes its checkpoint and ends `cancelled`: `run` or `submit` go on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import TYPE_CHECKING

from lorabench.commands._arguments import RESULTS, argument, open_store
from lorabench.config.decode import InputError
from lorabench.config.quote import clip, counted
from lorabench.terminal.text import talk, tell

if TYPE_CHECKING:
    from lorabench.cluster.cancel import Cancellation
    from lorabench.store.store import Store

MANY = 60
ARGUMENTS = [
    argument(
        "what", "a sweep file, the name of a sweep in the results, or a run's id or enough of its beginning",
        metavar="SWEEP|RUN",
    ),
    RESULTS,
    argument("--dry-run", "only say what would be cancelled", action="store_true"),
]  # fmt: skip


def main(arguments: argparse.Namespace) -> int:
    from lorabench.cluster.cancel import cancel, plan_cancellation
    from lorabench.cluster.run_states import standings
    from lorabench.terminal.text import count_statuses

    store = open_store(arguments.results)
    chosen = _chosen(store, arguments.what)
    found = standings(store)
    plan = plan_cancellation(found, chosen)
    if not plan.run_ids:
        known = [standing.state for standing in found if standing.run_id in chosen]
        told = [count_statuses(known)] * bool(known)
        not_begun = "it has not begun" if len(chosen) == 1 else f"{len(chosen) - len(known)} not begun"
        told += [not_begun] * (len(known) < len(chosen))
        talk(f"{clip(arguments.what)}: nothing to cancel: {', '.join(told)}")
        return 0
    if not arguments.dry_run:
        cancel(store, plan)
    _say(plan, "would cancel" if arguments.dry_run else "cancelled")
    return 0


def _chosen(store: Store, what: str) -> set[str]:
    """The ids that are meant. InputError names the closest sweep, where `what` is neither a sweep nor a run."""
    from lorabench.cluster.queue import read_submissions
    from lorabench.report.freshness import find_sweeps
    from lorabench.status.logs import find_run

    names = {file.parent.name for file in store.root.glob("*/sweep.toml")}
    submitted = {id for s in read_submissions(store.root) if s.sweep == what for id in s.specs}
    if os.path.isfile(what) or what in names:
        return submitted | {spec.id for spec in find_sweeps(store, what)[0].read().runs}
    if submitted:
        return submitted
    try:
        return {find_run(store, what, sweeps=names, declared=_declared(store, names))}
    except InputError as error:
        raise InputError([problem.replace("RUN =", "SWEEP|RUN =", 1) for problem in error.problems]) from None


def _declared(store: Store, names: set[str]) -> set[str]:
    """The runs of these sweeps, begun or not."""
    from lorabench.report.freshness import find_sweeps

    found: set[str] = set()
    for name in names:
        with contextlib.suppress(InputError):  # a damaged one declares nothing
            found |= {spec.id for spec in find_sweeps(store, name)[0].read().runs}
    return found


def _say(plan: Cancellation, done: str) -> None:
    """A line a job, or of many an array, and a line for each run that is cancelled alone; the counts come last."""
    from lorabench.cluster.slurm import condense_ids

    few = len(plan.jobs) <= MANY
    for job in plan.jobs if few else ():
        tell(f"job {job.job_id}  {' '.join(job.run_ids)}")
    for ids in condense_ids(job.job_id for job in plan.jobs) if not few else ():
        tell(f"jobs {ids}")
    for run_id, why in plan.alone.items():
        tell(f"run {run_id}  ({why})")
    inside = counted(len(plan.run_ids) - len(plan.alone), "run")
    counts = [f"{counted(len(plan.jobs), 'job')} with {inside}"] * bool(plan.jobs)
    counts += [f"{counted(len(plan.alone), 'run')} without their jobs"] * bool(plan.alone)
    ends = "; what was running writes its checkpoint first" if plan.marked and done == "cancelled" else ""
    talk(f"{done} {' and '.join(counts)}{ends}")
