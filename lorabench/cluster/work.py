"""What a job does: its runs, one after another in fresh processes of one warm server, until a signal stops it.

SLURM's warnings reach every process of a job. The runs are told to stop by this one alone: each writes its
checkpoint; then the job is queued again, or ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from lorabench.cluster import slurm
from lorabench.cluster.profile import Profile, packing
from lorabench.cluster.queue import Submission
from lorabench.config import json_file
from lorabench.config.decode import InputError
from lorabench.config.durable import write_json
from lorabench.launch.pool import Outcome, Pool, launch
from lorabench.launch.worker import Settings
from lorabench.processes.distributed import Place
from lorabench.processes.machine import visible_gpus
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.sweep import Sweep, read_sweep
from lorabench.store.claim import current_claim
from lorabench.store.crash_record import settle
from lorabench.store.record import FAILURES, Status
from lorabench.store.store import Store
from lorabench.terminal.text import talk

EARLY_SECONDS = 90.0
"""By so much SLURM's warning may come before it is due: it looks at its clocks every 30 or 60 s."""
MARGIN_SECONDS = 15.0
"""Of the time between the warning and the end, what is left for queueing the job again."""
LINGER_SECONDS = 900.0
"""How long a job that SLURM ends for a reason it cannot learn waits for that."""
TIMEOUTS = "timeouts.json"
"""In a run's folder: how often it was stopped by a job's time limit since it was submitted anew."""
SETTLED = (Status.DONE, *FAILURES, Status.CORRUPT)


class Work:
    """What jobs of lorabench 0.1.0 were pickled as: such a job ends here, and its runs are submitted again."""

    def __setstate__(self, state: object) -> None:
        raise InputError("this job was submitted by an older lorabench, as a pickle: submit again to resume its runs")


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
        pack=packing(profile).size,
        alone=_alone(store, submission),
        check=False,
        patience_seconds=max(1.0, profile.signal_seconds - MARGIN_SECONDS),
        server_log=submission.submitit / f"{job_id}_server.log",
    )
    sweep = Sweep(name=f"job {job_id}", text="", runs=tuple(specs))
    if profile.world_size == 1:
        return launch(sweep, store, pool)
    from submitit.helpers import TorchDistributedEnvironment

    from lorabench.launch.team import launch_together

    meeting = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    os.environ["MASTER_ADDR"] = _address(meeting.master_addr, profile.nodes)
    return launch_together(sweep, store, pool, Place.from_environment())


def _alone(store: Store, submission: Submission) -> frozenset[str]:
    """As the sweep says that is kept in the results; none where it can be read no more: all are packed."""
    try:
        return read_sweep(store.root / submission.sweep / "sweep.toml", submission.sweep, stored=True).alone
    except InputError:
        return frozenset()


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
                count = _num_timeouts(file) + 1
                write_json(file, {"count": count})
                if count > self.profile.max_timeouts:
                    error = f"stopped by the time limit of {self.profile.minutes} min, {count} times"
                    settle(self.store, state, Status.TIMEOUT, f"{error}; --retry timeout resumes it")


@dataclass(frozen=True, kw_only=True)
class _Timeouts:
    count: Annotated[int, Ge(0)] = 0


def _num_timeouts(file: Path) -> int:
    """As far as it can be read: a damaged file is no reason for a job not to be queued again."""
    try:
        return (json_file.read(_Timeouts, file) or _Timeouts()).count
    except InputError:
        return 0


def forget_timeouts(folder: Path) -> None:
    """Count a run's time-outs from none again."""
    (folder / TIMEOUTS).unlink(missing_ok=True)
