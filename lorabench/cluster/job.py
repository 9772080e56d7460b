"""The process that a cluster starts for a job: `python -m lorabench.cluster.job SUBMISSION FIRST`.

SUBMISSION is a folder of the queue, and FIRST the plan's number of the job, or of the first one of its array. All else
is read from the submission's `plan.json`, which holds text and numbers and is refused where another user could have
written it. Several tasks of a job are a process each.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from lorabench.cluster import slurm
from lorabench.cluster.profile import Profile, requeue_file
from lorabench.cluster.queue import Submission, check_own, read_submission
from lorabench.cluster.work import Interruption, compute
from lorabench.config.decode import InputError, decode
from lorabench.store.record import FAILURES
from lorabench.store.store import Store
from lorabench.terminal.text import talk

REQUEUE_TRIES, REQUEUE_SECONDS = 4, 3.0
EXIT_AGAIN = 144
"""By which submitit's controller of local jobs knows that a job is to be started again."""


def command(python: str, folder: Path, first: int) -> str:
    """The line that starts the jobs from number `first` on. `-P`: nothing is imported from where it is started."""
    return f"{python} -u -P -m lorabench.cluster.job {shlex.quote(str(folder.absolute()))} {first}"


def main(folder: Path, first: int) -> None:
    """Compute the job's runs. Ends in SystemExit where the job is queued again, or with what went wrong."""
    from submitit import JobEnvironment

    began, environment = time.time(), JobEnvironment()
    check_own(folder)
    submission = read_submission(folder)
    if submission is None:
        raise InputError(f"{folder}: its plan is gone")
    number = first + int(environment.array_task_id or 0)
    profile: Profile = decode(Profile, submission.profile)
    store = Store(folder.parents[1])
    if environment.global_rank == 0:
        signal.signal(signal.SIGUSR2, lambda *_: queue_again(submission, profile, environment.job_id))
        talk(f"{submission.name}: job {number}, {len(submission.jobs[number])} runs, on {environment.hostname}")
    outcome = compute(store, submission, profile, number, environment.job_id)
    if outcome is None:
        return
    if outcome.signal:
        interruption = Interruption(store=store, profile=profile, job_id=environment.job_id, began=began)
        if interruption.is_to_be_queued_again(outcome):
            queue_again(submission, profile, environment.job_id)
    if outcome.problem:
        raise SystemExit(outcome.problem)
    unwritten = [s.run_id for s in outcome.states if s.status in FAILURES and not store.state(s.run_id).record]
    if unwritten:  # a full disk: let SLURM call the job failed too
        raise SystemExit(f"{len(unwritten)} runs failed, and their records could not be written: {unwritten[0]}")


def queue_again(submission: Submission, profile: Profile, job_id: str) -> NoReturn:
    """Have the job started anew, and end."""
    if profile.kind == "local":
        raise SystemExit(EXIT_AGAIN)
    if profile.container:
        requeue_file(submission.submitit, os.environ["SLURM_JOB_ID"]).touch()
        raise SystemExit(0)
    for _ in range(REQUEUE_TRIES):
        try:
            slurm.requeue(job_id)
            raise SystemExit(EXIT_AGAIN)
        except slurm.Unreachable as error:  # a busy controller
            problem = error
        time.sleep(REQUEUE_SECONDS)
    raise SystemExit(f"{problem}; submit again to resume")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]))
    except InputError as wrong:
        raise SystemExit(f"lorabench: error: {wrong}") from None
