"""What was submitted, and in which job: `results/queue/<submission>/`.

    plan.json        written whole before anything is submitted: the runs, and which job each is in
    jobs.json        rewritten whole after each array that the cluster has taken
    cancelled.json   the jobs that `lorabench cancel` has cancelled
    submitit/        the scripts, and the jobs' stdout and stderr, named as submitit names them

Job k of a plan is element k - first of the array that begins at job `first`: SLURM's `<job_id>_<k - first>`, or
`<job_id>` itself where the array is of one job.
"""

from __future__ import annotations

import os
import pwd
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from lorabench.cluster.slurm import COMMENT as COMMENT
from lorabench.config import json_file
from lorabench.config.decode import InputError
from lorabench.config.durable import write_json
from lorabench.config.quote import show

CANCELLED_FILE = "cancelled.json"
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
Number = Annotated[int, Ge(0)]


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
        """Where the scripts are, and what the jobs print."""
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
    return sorted(Path(entry.path) for entry in os.scandir(queue) if os.path.isdir(entry) and entry.name[0] != ".")


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
            tell(f"{str(error).splitlines()[0]}; what is submitted there is not known")
            continue
        if submission is not None:
            yield submission


def read_submission(folder: Path) -> Submission | None:
    """None where no plan is written yet. InputError names a damaged file."""
    plan = json_file.read(_PlanFile, folder / "plan.json")
    if plan is None:
        return None
    taken = json_file.read(_JobsFile, folder / "jobs.json") or _JobsFile()
    cancelled = json_file.read(_CancelledFile, folder / CANCELLED_FILE) or _CancelledFile()
    ids = {array.first: array.job_id for array in taken.arrays}
    return Submission(
        name=folder.name,
        folder=folder,
        sweep=plan.sweep,
        cluster=plan.cluster,
        kind=plan.kind,
        submitted=plan.submitted,
        host=plan.host,
        user=plan.user or user_name((folder / "plan.json").stat().st_uid),
        slurm_cluster=plan.slurm_cluster,
        profile=plan.profile,
        specs=plan.specs,
        jobs=plan.jobs,
        arrays=tuple(Array(first=first, count=count, job_id=ids.get(first)) for first, count in plan.arrays),
        complete=taken.complete,
        retry=plan.retry,
        cancelled=frozenset(cancelled.jobs),
    )


@dataclass(frozen=True, kw_only=True)
class _PlanFile:
    sweep: str
    cluster: str
    kind: Literal["slurm", "local"]
    submitted: str
    host: str
    profile: dict[str, Any]
    specs: dict[str, dict[str, Any]]
    jobs: tuple[tuple[str, ...], ...]
    arrays: tuple[tuple[Number, Number], ...]
    submission: str = ""
    user: str | None = None
    slurm_cluster: str | None = None
    retry: dict[str, Number] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for run_id in self.specs:
            json_file.check_name(run_id.replace("/", "//"))
        unknown = {run_id for job in self.jobs for run_id in job} - self.specs.keys()
        outside = [first for first, count in self.arrays if not 0 < count <= len(self.jobs) - first]
        problems = [f"jobs: {show(min(unknown))} is none of its runs"] if unknown else []
        problems += [f"arrays: the one from job {outside[0]} on holds none, or more than there are"] if outside else []
        try:
            datetime.fromisoformat(self.submitted).timestamp()
        except (ValueError, OverflowError):
            problems.append(f"submitted = {show(self.submitted)}: is no time")
        if problems:
            raise InputError(problems)


@dataclass(frozen=True, kw_only=True)
class _TakenArray:
    job_id: str
    first: Number
    count: Number

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9]+", self.job_id):  # it is handed to scancel
            raise InputError(f"job_id = {show(self.job_id)}: is no number of a job")


@dataclass(frozen=True, kw_only=True)
class _JobsFile:
    arrays: tuple[_TakenArray, ...] = ()
    complete: bool = False


@dataclass(frozen=True, kw_only=True)
class _CancelledFile:
    jobs: tuple[Number, ...] = ()


def note_cancelled(submission: Submission, jobs: Iterable[int]) -> None:
    """Keep it with the submission that these of its jobs were cancelled."""
    file = submission.folder / CANCELLED_FILE
    before = json_file.read(_CancelledFile, file) or _CancelledFile()
    write_json(file, {"jobs": sorted({*before.jobs, *jobs})})


def keep_own(path: Path) -> None:
    """Let nobody but its owner write a file, or into a folder."""
    path.chmod(stat.S_IMODE(path.stat().st_mode) & ~OTHERS_WRITE)


def check_own(folder: Path) -> None:
    """InputError unless a submission is this user's, and its plan what this user wrote.

    Who writes a plan decides what its jobs read and compute, with the rights of the one whose jobs they are.
    """
    for path in (folder, folder / "plan.json"):
        try:
            found = path.lstat()
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        if stat.S_ISLNK(found.st_mode):
            raise InputError(f"{path}: is a link")
        if found.st_uid not in (os.geteuid(), 0):
            raise InputError(f"{path}: belongs to {user_name(found.st_uid)}, not to {user_name(os.geteuid())}")
        if found.st_mode & OTHERS_WRITE:
            raise InputError(f"{path}: others may write it (mode {stat.S_IMODE(found.st_mode):o}): not believed")


def user_name(number: int | None = None) -> str:
    """Of this process, or of the user with this number; the number where it has no name here."""
    number = os.getuid() if number is None else number
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
