"""The queue's writing side: a submission is written down before it is made, and one submit at a time makes it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lorabench.cluster.queue import Array, Submission, check_own, keep_own, read_submission, user_name
from lorabench.config.decode import InputError
from lorabench.config.durable import make_folder, write_bytes, write_json
from lorabench.store import claim
from lorabench.store.record import now

POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is going to be submitted; `plan.json` holds this, and where and when."""

    sweep: str
    cluster: str
    """Name of the profile."""
    kind: str
    slurm_cluster: str | None
    profile: dict[str, Any]
    specs: dict[str, dict[str, Any]]
    jobs: list[list[str]]
    arrays: list[tuple[int, int]]
    """(first job, number of jobs)."""
    retry: dict[str, int]
    """Of each run that had ended badly, the number of its last claim: its job repeats it while that is the last."""


def new_name(sweep: str) -> str:
    """`20260131-120000-quickstart-1f3a`: sorts by time, and is a file name and a job's comment without quotes."""
    plain = re.sub(r"[^\w.+-]", "_", sweep, flags=re.ASCII)
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{plain}-{os.urandom(2).hex()}"


def write_plan(root: Path, name: str, plan: Plan) -> Submission:
    """Begin a submission: it counts from the moment at which its `plan.json` is there, whole.

    Only this user may write it, whatever the umask: a job refuses what others may have written. InputError where the
    file system has no such rights.
    """
    folder = root / "queue" / name
    make_folder(folder)
    keep_own(folder)
    head = {"submission": name, "submitted": now()}
    table = head | {"host": socket.gethostname(), "user": user_name()} | vars(plan)
    write_bytes(folder / "plan.json", (json.dumps(table, ensure_ascii=False) + "\n").encode())
    keep_own(folder / "plan.json")
    check_own(folder)
    submission = read_submission(folder)
    if submission is None:
        raise InputError(f"{folder}: was taken away while it was submitted")
    return submission


def write_jobs(submission: Submission, arrays: Sequence[Array]) -> None:
    """Note the arrays that the cluster has taken by now."""
    rows = [{"job_id": array.job_id, "first": array.first, "count": array.count} for array in arrays]
    complete = sum(array.count for array in arrays) == len(submission.jobs)
    write_json(submission.folder / "jobs.json", {"arrays": rows, "complete": complete})


@contextlib.contextmanager
def only_one(root: Path, say: Callable[[str], None]) -> Iterator[claim.Hold]:
    """Hold the store's queue: one submit at a time, on all machines that share it. Waits for another, and says so."""
    said = False
    while (hold := claim.take(root / "queue")) is None:
        owner = claim.current_claim(root / "queue")
        if owner and not said:
            say(f"waiting for another submit ({owner.host}, pid {owner.pid})")
            said = True
        time.sleep(POLL_SECONDS)
    with hold:
        fresh = root / "queue" / f".fresh.{os.getpid()}"  # NFS: else the folder may be listed as it was before
        fresh.touch()
        fresh.unlink()
        yield hold
