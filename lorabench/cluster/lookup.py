"""Which jobs of the submissions are still there: SLURM's queue and this machine's processes, asked once for all."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from lorabench.cluster import local, slurm
from lorabench.cluster.queue import COMMENT, Submission, user_name
from lorabench.store.claim import current_claim

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A job as it stands now."""

    job_id: str | None = None
    is_queued: bool | None = None
    """Waiting or running; None where that cannot be known."""
    state: str | None = None
    """SLURM's word; None where it does not know the job (any more)."""
    reason: str | None = None
    start: str | None = None
    end: str | None = None
    nodes: str | None = None
    is_ours: bool = True
    """Whether it is known to be the submission's job: of its user, and with its comment."""


class Lookup:
    """How the jobs of these submissions stand.

    Where SLURM does not answer, Unreachable is raised; with `tell` it is told once instead, and nothing is known of
    its jobs.
    """

    def __init__(self, submissions: Iterable[Submission], tell: Tell | None = None):
        submissions = list(submissions)
        self._jobs: dict[str, slurm.Job] = {}
        self._arrays: dict[tuple[str, str | None], set[str]] = {}
        self._problem: str | None = None
        self._cluster: str | None = None
        self._only_own = False
        if any(submission.kind == "slurm" for submission in submissions):
            self._ask(submissions, tell)
        self._seen = {submission.name: self._look(submission) for submission in submissions}

    def seen(self, submission: Submission, job: int) -> Seen:
        if submission.name not in self._seen:  # was not asked for: all of its runs are settled
            return Seen(job_id=submission.job_ids[job])
        return self._seen[submission.name][job]

    def _ask(self, submissions: list[Submission], tell: Tell | None) -> None:
        try:
            jobs = slurm.list_jobs({user_name(), *(s.user for s in submissions if s.kind == "slurm")})
            if any(submission.slurm_cluster or submission.user != user_name() for submission in submissions):
                config = slurm.config()
                self._cluster = config.get("ClusterName")
                self._only_own = "jobs" in config.get("PrivateData", "").split(",")
        except slurm.Unreachable as error:
            if tell is None:
                raise
            self._problem = error.problems[0]
            tell(f"{self._problem}; what waits or runs on the cluster is not known")
            return
        for job in jobs:
            self._jobs[job.id] = job
            if job.comment and _is_lorabench(job):
                self._arrays.setdefault((job.comment, job.user), set()).add(job.id.partition("_")[0])

    def _look(self, submission: Submission) -> list[Seen]:
        why = self._unknown(submission)
        if why:
            return [Seen(job_id=job_id, reason=why) for job_id in submission.job_ids]
        if not submission.complete:
            submission = self._with_unwritten(submission)
        unwritten = Seen(is_queued=False)
        if not submission.complete and is_submitting(submission):
            unwritten = Seen(is_queued=True, state="SUBMITTING")
        look = self._process(submission) if submission.kind == "local" else self._job(submission)
        return [unwritten if job_id is None else look(job_id) for job_id in submission.job_ids]

    def _unknown(self, submission: Submission) -> str | None:
        """Why nothing can be known of a submission's jobs."""
        if submission.kind == "local":
            here = submission.host == socket.gethostname()
            return None if here else f"on {submission.host}; not seen from here"
        if self._problem:
            return "SLURM did not answer"
        if submission.slurm_cluster not in (None, self._cluster):
            return f"on cluster {submission.slurm_cluster}; not seen from here"
        if self._only_own and submission.user != user_name():
            return f"{submission.user}'s; this cluster shows everyone only his own jobs"
        return None

    def _job(self, submission: Submission) -> Callable[[str], Seen]:
        comment = COMMENT + submission.name

        def look(job_id: str) -> Seen:
            job = self._jobs.get(job_id)
            if job is None or job.user != submission.user or (_is_lorabench(job) and job.comment != comment):
                # a cluster that was set up anew counts its jobs from one again
                return Seen(job_id=job_id, is_queued=False)
            return Seen(
                job_id=job_id, is_queued=job.is_queued, state=job.state, reason=job.reason, start=job.start,
                end=job.end, nodes=job.nodes, is_ours=job.comment == comment,
            )  # fmt: skip

        return look

    def _process(self, submission: Submission) -> Callable[[str], Seen]:
        def look(pid: str) -> Seen:
            alive = local.is_alive(pid, submission.submitit)
            return Seen(job_id=pid, is_queued=alive, state="RUNNING" if alive else None)

        return look

    def _with_unwritten(self, submission: Submission) -> Submission:
        """The submission with the ids of arrays that SLURM took before its submitter, who died, could write them."""
        written = {array.job_id for array in submission.arrays}
        unwritten = iter(
            sorted(self._arrays.get((COMMENT + submission.name, submission.user), set()) - written, key=int)
        )
        arrays = [a if a.job_id else replace(a, job_id=next(unwritten, None)) for a in submission.arrays]
        return replace(submission, arrays=tuple(arrays))


def _is_lorabench(job: slurm.Job) -> bool:
    """By its comment; a site may write another one there."""
    return (job.comment or "").startswith(COMMENT)


def is_submitting(submission: Submission) -> bool:
    """Whether another process is submitting just now; the lock of `lorabench submit` says so."""
    claim = current_claim(submission.folder.parent)
    if claim is None or (claim.pid, claim.host) == (os.getpid(), socket.gethostname()):
        return False
    return claim.is_alive()
