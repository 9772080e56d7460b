"""What a job does: its runs, one after another in fresh processes of one warm server, until a signal stops it.

SLURM's warnings reach every process of a job. The runs are told to stop by this one alone: each writes its
checkpoint; then the job is queued again, by submitit, or ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.claim import current_claim
from lorabench.cluster import slurm
from lorabench.cluster.profile import Profile, requeue_file
from lorabench.cluster.queue import Submission, read_submission
from lorabench.decode import InputError, decode
from lorabench.distributed import Place
from lorabench.launch import Outcome, Pool, launch
from lorabench.machine import visible_gpus
from lorabench.record import FAILURES, Status, Store, read_json, write_json
from lorabench.settle import settle
from lorabench.spec import RunSpec
from lorabench.sweep import Sweep
from lorabench.terminal import talk
from lorabench.worker import Settings

if TYPE_CHECKING:
    from submitit.core.utils import DelayedSubmission

ENDLESS = 10**9
"""Time-outs that submitit allows a job: they are counted here, a run at a time."""
EARLY_SECONDS = 90.0
"""By so much SLURM's warning may come before it is due: it looks at its clocks every 30 or 60 s."""
MARGIN_SECONDS = 15.0
"""Of the time between the warning and the end, what is left for queueing the job again."""
LINGER_SECONDS = 900.0
"""How long a job that SLURM ends for a reason it cannot learn waits for that."""
REQUEUE_TRIES, REQUEUE_SECONDS = 4, 3.0
TIMEOUTS = "timeouts.json"
"""In a run's folder: how often it was stopped by a job's time limit since it was submitted anew."""
SETTLED = (Status.DONE, *FAILURES, Status.CORRUPT)


@dataclass(frozen=True, kw_only=True)
class Work:
    """One job of a submission. It is pickled, and reads all else from the submission's plan when it starts."""

    root: str
    submission: str
    number: int

    def __call__(self) -> dict[str, str]:
        """Compute the job's runs; run id -> status. May end in SystemExit, where the job is queued again."""
        from submitit import JobEnvironment

        began, job_id = time.time(), JobEnvironment().job_id
        requeue = signal.getsignal(signal.SIGUSR2)
        store = Store(Path(self.root))
        submission = read_submission(store.root / "queue" / self.submission)
        if submission is None:
            raise InputError(f"{self.submission}: its plan is gone")
        profile: Profile = decode(Profile, submission.profile)
        outcome = compute(store, submission, profile, self.number, job_id)
        if outcome is None:
            return {}
        if outcome.signal:
            interruption = Interruption(store=store, profile=profile, job_id=job_id, began=began)
            if interruption.is_to_be_queued_again(outcome):
                self._queue_again(submission, profile, requeue)
        unwritten = [s.run_id for s in outcome.states if s.status in FAILURES and not store.state(s.run_id).record]
        if unwritten:  # a full disk: let SLURM call the job failed too
            raise RuntimeError(f"{len(unwritten)} runs failed, and their records could not be written: {unwritten[0]}")
        return {state.run_id: str(state.status) for state in outcome.states}

    def _queue_again(self, submission: Submission, profile: Profile, handler: Any) -> None:
        if profile.container and "SLURM_JOB_ID" in os.environ:
            requeue_file(submission.submitit, os.environ["SLURM_JOB_ID"]).touch()
        elif callable(handler):
            for _ in range(REQUEUE_TRIES):
                with contextlib.suppress(subprocess.SubprocessError, OSError):  # scontrol: a busy controller
                    handler(signal.SIGUSR2, None)
                time.sleep(REQUEUE_SECONDS)
            raise RuntimeError("scontrol requeue has failed; submit again to resume")

    def checkpoint(self) -> DelayedSubmission | None:
        """What submitit queues again: the same job, which goes on with what is not done yet."""
        from submitit.core.utils import DelayedSubmission

        return DelayedSubmission(self)


def compute(store: Store, submission: Submission, profile: Profile, number: int, job_id: str) -> Outcome | None:
    """Launch the runs of job `number` that are not settled since they were submitted.

    Of several tasks, which compute each run together, the first one launches; None on the others.
    """
    run_ids = [run_id for run_id in submission.jobs[number] if not store.cancel_marker(run_id).exists()]
    specs = [RunSpec.from_json(submission.specs[run_id]) for run_id in run_ids]
    device = profile.run_device
    pool = Pool(
        workers=profile.cells_at_once,
        gpus=visible_gpus(device),
        settings=Settings(
            device=device, checkpoint_seconds=profile.checkpoint_seconds, job=job_id, sharding=profile.sharding
        ),
        again=frozenset(id for id in run_ids if submission.retry.get(id) == _claims(store.folder(id))),
        check=False,
        patience_seconds=max(1.0, profile.signal_seconds - MARGIN_SECONDS),
        server_log=submission.submitit / f"{job_id}_server.log",
    )
    sweep = Sweep(name=f"job {job_id}", text="", runs=tuple(specs))
    if profile.world_size == 1:
        return launch(sweep, store, pool)
    from submitit.helpers import TorchDistributedEnvironment

    from lorabench.team import launch_together

    meeting = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    os.environ["MASTER_ADDR"] = _address(meeting.master_addr, profile.nodes)
    return launch_together(sweep, store, pool, Place.from_environment())


def _address(host: str, num_nodes: int) -> str:
    """Where the first node's processes are to be reached."""
    if num_nodes == 1:
        return "127.0.0.1"
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return slurm.node_address(host)  # a name that only SLURM knows
    return host


def _claims(folder: Path) -> int:
    claim = current_claim(folder)
    return claim.number if claim else 0


@dataclass(frozen=True, kw_only=True)
class Interruption:
    """A job that was told to stop."""

    store: Store
    profile: Profile
    job_id: str
    began: float
    """Unix time."""

    def is_to_be_queued_again(self, outcome: Outcome) -> bool:
        """Whether the job has more to do and was not told to stop for good; counts the time-out, if it is one."""
        details = self._details()
        preempted = details.get("PreemptTime", "None") not in ("None", "")
        if details.get("JobState", "RUNNING") != "RUNNING" and details.get("Reason") != "TimeLimit":
            return False  # cancelled, if after another signal; or SLURM queues it again, and has said so already
        if outcome.signal == signal.SIGUSR2:
            if not preempted and self._seconds_left(details) <= self.profile.signal_seconds + EARLY_SECONDS:
                self._count_timeouts(outcome)
        elif not preempted:
            if self.profile.kind == "slurm" and not details:  # SLURM queues a preempted job again only if it
                time.sleep(LINGER_SECONDS)  # is still there at the end of its grace; a cancelled one it kills
            return False
        left = [id for id in (state.run_id for state in outcome.states) if not self._is_settled(id)]
        talk(f"stopped by {signal.Signals(outcome.signal or 0).name}: {len(left)} runs are left")
        return bool(left) and self.profile.requeue

    def _details(self) -> dict[str, str]:
        if self.profile.kind == "slurm":
            with contextlib.suppress(slurm.Unreachable):  # in a container, say: then the clock has to do
                return slurm.job_details(self.job_id)
        return {}

    def _seconds_left(self, details: dict[str, str]) -> float:
        """Until the job's time limit."""
        with contextlib.suppress(KeyError, ValueError):
            return datetime.fromisoformat(details["EndTime"]).timestamp() - time.time()
        return self.began + 60 * self.profile.minutes - time.time()

    def _is_settled(self, run_id: str) -> bool:
        return self.store.state(run_id).status in SETTLED or self.store.cancel_marker(run_id).exists()

    def _count_timeouts(self, outcome: Outcome) -> None:
        """One more for each run that was being computed; it was the last where there are too many."""
        for run_id in outcome.stopped:
            state = self.store.state(run_id)
            if state.status in (*SETTLED, Status.RUNNING) or self.store.cancel_marker(run_id).exists():
                continue
            file = self.store.folder(run_id) / TIMEOUTS
            with contextlib.suppress(OSError):  # a full disk: to be queued again matters more
                count = (read_json(file) or {}).get("count", 0) + 1
                write_json(file, {"count": count})
                if count > self.profile.max_timeouts:
                    error = f"stopped by the time limit of {self.profile.minutes} min, {count} times"
                    settle(self.store, state, Status.TIMEOUT, f"{error}; --retry timeout resumes it")


def forget_timeouts(folder: Path) -> None:
    """Count a run's time-outs from none again."""
    (folder / TIMEOUTS).unlink(missing_ok=True)
