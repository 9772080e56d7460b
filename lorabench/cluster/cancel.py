"""Cancelling: the jobs that hold nothing but what is to be cancelled, and single runs of the others.

A run that goes on elsewhere, or shares its job with runs that are to go on, gets a marker in its folder: it writes
its checkpoint at its next step and ends `cancelled`, and its job goes on with the others.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from lorabench.cluster import local, slurm
from lorabench.cluster.queue import Submission, note_cancelled, user_name
from lorabench.cluster.run_states import UNSETTLED, Place, Standing
from lorabench.config.durable import write_bytes
from lorabench.store.record import Status
from lorabench.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A job all of whose runs that are not settled are cancelled: itself is."""

    submission: Submission
    job: int
    job_id: str
    run_ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Cancellation:
    """What is to be cancelled, and how."""

    jobs: list[Whole]
    marked: list[str]
    """Runs that get a marker: those of a job that goes on, and each one that is running now."""
    alone: dict[str, str]
    """Of these, the runs that are cancelled without their job -> why."""

    @property
    def run_ids(self) -> list[str]:
        return [*(run_id for job in self.jobs for run_id in job.run_ids), *self.alone]


def plan_cancellation(standings: Collection[Standing], chosen: Collection[str]) -> Cancellation:
    """How to cancel those of the `chosen` runs that wait or run. `standings` are of all that share a job with them."""
    unsettled = [standing for standing in standings if standing.status in UNSETTLED]
    held: dict[tuple[str, int], list[Standing]] = {}
    for standing in unsettled:
        if standing.place and standing.queue and standing.queue.job_id:
            held.setdefault(_key(standing.place), []).append(standing)
    wanted = set(chosen)
    jobs: list[Whole] = []
    alone: dict[str, str] = {}
    for runs in held.values():
        ours = [standing for standing in runs if standing.run_id in wanted]
        place, queue = runs[0].place, runs[0].queue
        assert place and queue and queue.job_id
        is_ours = place.submission.user == user_name() and runs[0].is_ours and queue.state is not None
        if is_ours and len(ours) == len(runs):
            run_ids = tuple(standing.run_id for standing in ours)
            jobs.append(Whole(submission=place.submission, job=place.job, job_id=queue.job_id, run_ids=run_ids))
        else:
            alone |= {standing.run_id: _why(place, runs, ours) for standing in ours}
    in_jobs = {run_id for job in jobs for run_id in job.run_ids} | set(alone)
    outside = [s for s in unsettled if s.run_id in wanted and s.run_id not in in_jobs]
    alone |= {standing.run_id: "is in no job" for standing in outside}
    running = [s.run_id for s in unsettled if s.run_id in in_jobs and s.status == Status.RUNNING]
    return Cancellation(jobs=jobs, marked=list(dict.fromkeys([*alone, *running])), alone=alone)


def _key(place: Place) -> tuple[str, int]:
    return place.submission.name, place.job


def _why(place: Place, runs: list[Standing], ours: list[Standing]) -> str:
    queue = runs[0].queue
    if place.submission.user != user_name():
        return f"its job is {place.submission.user}'s"
    if queue is None or queue.state is None:
        return "its job cannot be reached from here"
    if not runs[0].is_ours:
        return f"job {queue.job_id} does not say that it is lorabench's"
    return f"its job holds {len(runs) - len(ours)} runs that go on"


def cancel(store: Store, plan: Cancellation) -> None:
    """Do it. Raises slurm.Unreachable where SLURM does not answer: the markers stand then all the same."""
    for run_id in plan.marked:
        write_bytes(store.cancel_marker(run_id), b"")
    by_submission: dict[str, list[Whole]] = {}
    for whole in plan.jobs:
        by_submission.setdefault(whole.submission.name, []).append(whole)
    for jobs in by_submission.values():
        submission = jobs[0].submission
        if submission.kind == "local":
            for whole in jobs:
                local.cancel(whole.job_id, submission.submitit)
        else:
            slurm.cancel(whole.job_id for whole in jobs)
        note_cancelled(submission, (whole.job for whole in jobs))
