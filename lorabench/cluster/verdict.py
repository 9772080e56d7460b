"""What became of a run whose job is gone without a result: what the accounting says of the job, and what it means."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lorabench.cluster.slurm import ENDED, Ended
from lorabench.store.claim import Claim
from lorabench.store.record import Status

CLOCK_SECONDS = 120.0
"""By so much the clocks of a cluster's machines may differ."""
LATE_SECONDS = 90.0
"""After a job's end, until NFS shows here all that it has written: by default folders are looked at anew in 60 s."""
MOUNTS = Path("/proc/self/mountinfo")
TAIL_BYTES = 65536
_FINDINGS = {
    "OUT_OF_MEMORY": (Status.OOM, "was killed for its memory"),
    "TIMEOUT": (Status.TIMEOUT, "was ended at its time limit"),
    "DEADLINE": (Status.TIMEOUT, "was ended at its deadline"),
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`lost` is no record's status: the run is simply submitted again."""

    status: Status
    error: str


def judge(job_id: str, began: bool, ended: Ended | None, why: str) -> Verdict:
    """Of a run without a result; `began` says whether the job had taken it up, `why` what to say if nothing is known.

    Out of memory and out of time are findings about the runs that were being computed. What the job had not begun, or
    what a dead node took away, is lost, and a cancelled job's runs are cancelled, begun or not.
    """
    if ended is None:
        return Verdict(status=Status.LOST, error=f"its job {job_id} is gone; {why}")
    if ended.state not in ENDED:
        told = f"its job {job_id} is gone, though the accounting has it as {ended.state}"
        return Verdict(status=Status.LOST, error=told)
    where = f" on {ended.nodes}" if ended.nodes else ""
    if ended.state == "CANCELLED":
        return Verdict(status=Status.CANCELLED, error=f"its job {job_id} was cancelled; run or submit again to resume")
    if began and ended.state in _FINDINGS:
        status, text = _FINDINGS[ended.state]
        return Verdict(status=status, error=f"its job {job_id} {text}{where}")
    left = "without its result" if began else "before the run began"
    return Verdict(status=Status.LOST, error=f"its job {job_id} ended {left}: {_ending(ended)}{where}")


def _ending(ended: Ended) -> str:
    if ended.signal:
        return f"{ended.state}, signal {ended.signal}"
    return f"{ended.state}, exit code {ended.exit_code}" if ended.exit_code else ended.state


def tells_of_memory(logs: Iterable[Path]) -> bool:
    """Whether SLURM says in a job's log that it was killed for its memory: the job itself then merely FAILED."""
    for log in logs:
        with contextlib.suppress(OSError), open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            if re.search(rb"slurmstepd\S*: error: .*oom.kill event", file.read(), re.I):
                return True
    return False


def shows_late(root: Path) -> bool:
    """Whether what other machines write below `root` is seen here only after a while: on NFS."""
    with contextlib.suppress(OSError):
        device = os.stat(root).st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        mounts = [line.partition(" - ") for line in MOUNTS.read_text(errors="replace").splitlines()]
        return any(left.split()[2] == number and kind.startswith("nfs") for left, _, kind in mounts)
    return False


def has_just_ended(ended: Ended | None, claim: Claim | None) -> bool:
    """Whether a job may have written what NFS does not show yet. Its run's last heartbeat counts if no end is known."""
    if ended and ended.end:
        end = datetime.fromisoformat(ended.end).timestamp()
    elif claim:
        end = claim.time
    else:
        return False
    return -CLOCK_SECONDS < time.time() - end < LATE_SECONDS


def began_by(claim: Claim | None, job_id: str, submitted: float, ended: Ended | None) -> bool | None:
    """Whether the run's latest claim is this job's; None if a worker outside of it has had the run since.

    `submitted` is Unix time. A claim whose worker died in its first seconds does not name its job yet.
    """
    if claim is None or claim.time < submitted - CLOCK_SECONDS:
        return False
    if "job" in claim.progress:
        return True if claim.progress["job"] == job_id else None
    if claim.progress:
        return None
    end = datetime.fromisoformat(ended.end).timestamp() if ended and ended.end else None
    return None if end is not None and claim.time > end + CLOCK_SECONDS else True
