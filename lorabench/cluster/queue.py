"""What was submitted, and in which job: `results/queue/<submission>/`.

    plan.json        written whole before anything is submitted: the runs, and which job each is in
    jobs.json        rewritten whole after each array that the cluster has taken
    cancelled.json   the jobs that `lorabench cancel` has cancelled
    submitit/        submitit's own files: scripts, pickles, the jobs' stdout and stderr

Job k of a plan is element k - first of the array that begins at job `first`: SLURM's `<job_id>_<k - first>`, or
`<job_id>` itself where the array is of one job.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from lorabench.cluster.slurm import COMMENT as COMMENT
from lorabench.decode import InputError
from lorabench.record import read_json, write_json

CANCELLED_FILE = "cancelled.json"


@dataclass(frozen=True, kw_only=True)
class Array:
    """Jobs of the plan that were, or were to be, submitted as one array."""

    first: int
    count: int
    job_id: str | None = None
    """None where it was never submitted, or the submitter died before it could write the id."""

    def element(self, job: int) -> str | None:
        """The cluster's id of job `job` of the plan."""
        if self.job_id is None or self.count == 1:
            return self.job_id
        return f"{self.job_id}_{job - self.first}"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One call of `lorabench submit`."""

    name: str
    folder: Path
    sweep: str
    cluster: str
    """Name of the profile."""
    kind: str
    """`slurm` or `local`."""
    submitted: str
    """UTC, ISO 8601."""
    host: str
    user: str
    slurm_cluster: str | None
    """SLURM's own name of the cluster, ClusterName; None where it is not known."""
    profile: dict[str, Any]
    specs: dict[str, dict[str, Any]]
    """Run id -> spec, as in `spec.json`."""
    jobs: tuple[tuple[str, ...], ...]
    """Run ids of each job, in the order in which it computes them."""
    arrays: tuple[Array, ...]
    complete: bool
    """Whether all arrays were submitted and their ids written."""
    retry: dict[str, int]
    """Of each run that had ended badly, the number of its last claim: its job repeats it while that is the last."""
    cancelled: frozenset[int] = frozenset()
    """Jobs that `lorabench cancel` has cancelled: SLURM forgets those that had not begun."""

    @property
    def submitit(self) -> Path:
        """submitit's own folder: pickles, scripts, and what the jobs print."""
        return self.folder / "submitit"

    def job_logs(self, job_id: str) -> list[Path]:
        """What a job has printed, of each of its tasks: stderr, then stdout."""
        return sorted(self.submitit.glob(f"{job_id}_*_log.*"))

    @cached_property
    def job_ids(self) -> list[str | None]:
        """The cluster's id of each job; None where it is not known."""
        found: list[str | None] = [None] * len(self.jobs)
        for array in self.arrays:
            for job in range(array.first, array.first + array.count):
                found[job] = array.element(job)
        return found

    @cached_property
    def time(self) -> float:
        """Unix time of the submission."""
        return datetime.fromisoformat(self.submitted).timestamp()


def submission_folders(root: Path) -> list[Path]:
    """Folders of the submissions below results folder `root`, oldest first."""
    queue = root / "queue"
    if not queue.is_dir():
        return []
    return sorted(Path(entry.path) for entry in os.scandir(queue) if entry.is_dir() and entry.name[0] != ".")


def read_submissions(root: Path, tell: Callable[[str], None] | None = None) -> Iterator[Submission]:
    """The submissions below results folder `root`, oldest first.

    InputError names a damaged file; with `tell` it is told instead, and its submission left out.
    """
    for folder in submission_folders(root):
        try:
            submission = read_submission(folder)
        except InputError as error:
            if tell is None:
                raise
            tell(f"{error.problems[0]}; what is submitted there is not known")
            continue
        if submission is not None:
            yield submission


def read_submission(folder: Path) -> Submission | None:
    """None where no plan is written yet. InputError names a damaged file."""
    plan = read_json(folder / "plan.json")
    if plan is None:
        return None
    jobs = read_json(folder / "jobs.json") or {}
    try:
        ids = {entry["first"]: str(entry["job_id"]) for entry in jobs.get("arrays", [])}
        arrays = tuple(Array(first=first, count=count, job_id=ids.get(first)) for first, count in plan["arrays"])
        submission = Submission(
            name=folder.name,
            folder=folder,
            arrays=arrays,
            jobs=tuple(map(tuple, plan["jobs"])),
            user=plan.get("user") or user_name((folder / "plan.json").stat().st_uid),
            slurm_cluster=plan.get("slurm_cluster"),
            complete=bool(jobs.get("complete", False)),
            cancelled=frozenset((read_json(folder / CANCELLED_FILE) or {}).get("jobs", [])),
            retry=plan.get("retry", {}),
            **{key: plan[key] for key in ("sweep", "cluster", "kind", "submitted", "host", "profile", "specs")},
        )
        submission.time, submission.job_ids  # noqa: B018  # both fail here, and not at a reader's, if the plan is damaged
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{folder}: plan.json and jobs.json cannot be read: {error!r}") from None
    return submission


def note_cancelled(submission: Submission, jobs: Iterable[int]) -> None:
    """Keep it with the submission that these of its jobs were cancelled."""
    file = submission.folder / CANCELLED_FILE
    before = (read_json(file) or {}).get("jobs", [])
    write_json(file, {"jobs": sorted({*before, *jobs})})


def user_name(number: int | None = None) -> str:
    """Of this process, or of the user with this number; the number where it has no name here."""
    number = os.getuid() if number is None else number
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
