"""A real SLURM at random: controller and daemons killed, nodes lost, preemption, requeue, scancel, stopped workers.

A round is a fresh store and a submission. Blows fall until nothing is queued any more; `submit` is then asked again,
never with `--retry`, until every run is done. Then every file is held against those of a store that was left alone.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lorabench.store.record import Status
from lorabench.store.store import Store
from tests import sandbox as sandboxes
from tests.campaign.kills import Figures, Watch, differences
from tests.sandbox import Sandbox, send
from tests.study import BASE, Study

SWEEP = BASE + "steps = 120\n[[grid]]\nmethod.rank = [1, 2]\nseed = [0, 1]\n"
MOST_BLOWS, MOST_SUBMITS, IDLE_SECONDS = 6, 8, 240


def missing() -> str | None:
    """Why there can be no real SLURM here."""
    return sandboxes.missing(())


class Blows:
    """All that can happen to the cluster and its jobs."""

    def __init__(self, study: Study, random_: random.Random):
        self.study, self.sandbox, self.random = study, study.sandbox, random_

    @property
    def all(self) -> dict[str, Callable[[], bool]]:
        """Each says whether there was anything to strike."""
        return {
            "worker": self.worker, "job": self.job, "controller": self.controller, "daemon": self.daemon,
            "node": self.node, "preemption": self.preemption, "requeue": self.requeue, "scancel": self.scancel,
            "stop": self.stop,
        }  # fmt: skip

    def _claims(self) -> list[int]:
        claims = [state.claim for state in self.study.store.states() if state.status == Status.RUNNING]
        return [claim.pid for claim in claims if claim and claim.is_alive()]

    def _jobs(self, *states: str) -> list[dict[str, str]]:
        return [job for job in self.sandbox.queue() if job["state"] in states and job["partition"] == "main"]

    def worker(self) -> bool:
        pids = self._claims()
        if pids:
            send(self.random.choice(pids), signal.SIGKILL)
        return bool(pids)

    def stop(self) -> bool:
        """A worker that stands still for some seconds."""
        pids = self._claims()
        if pids:
            pid = self.random.choice(pids)
            send(pid, signal.SIGSTOP)
            time.sleep(self.random.uniform(0.5, 5))
            send(pid, signal.SIGCONT)
        return bool(pids)

    def job(self) -> bool:
        """All processes of a node's jobs, those of the batch scripts apart."""
        jobs = self._jobs("RUNNING")
        if jobs:
            for pid in self.sandbox.tasks(self.random.choice(jobs)["node"]):
                send(pid, signal.SIGKILL)
        return bool(jobs)

    def controller(self) -> bool:
        self._kill_daemon("slurmctld")
        time.sleep(self.random.uniform(0, 8))
        self.sandbox.up()
        return True

    def daemon(self) -> bool:
        """A node's slurmd; its jobs go on without."""
        jobs = self._jobs("RUNNING")
        if jobs:
            self._kill_daemon(f"slurmd.{self.random.choice(jobs)['node']}")
            time.sleep(self.random.uniform(0, 5))
            self.sandbox.up()
        return bool(jobs)

    def _kill_daemon(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError, ValueError):
            send(int((self.sandbox.folder / "pid" / name).read_text()), signal.SIGKILL)

    def node(self) -> bool:
        jobs = self._jobs("RUNNING")
        if jobs:
            self.sandbox.fail_node(self.random.choice(jobs)["node"])
            time.sleep(self.random.uniform(1, 12))
            self.sandbox.up()
        return bool(jobs)

    def preemption(self) -> bool:
        self.sandbox.preempt()
        return True

    def requeue(self) -> bool:
        return self._by_id("scontrol", "requeue")

    def scancel(self) -> bool:
        return self._by_id("scancel")

    def _by_id(self, *command: str) -> bool:
        jobs = self._jobs("RUNNING")
        if jobs:
            with contextlib.suppress(AssertionError):  # it has just ended
                self.sandbox.call(*command, self.random.choice(jobs)["id"])
        return bool(jobs)


def campaign(minutes: float, seed: int, say: Callable[[str], None] = print) -> Figures:
    """Rounds until the time is over; a round that has begun is ended."""
    os.environ[sandboxes.REQUIRED] = "1"
    random_, figures = random.Random(seed), Figures()
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="lorabench-campaign-") as name, sandboxes.started() as sandbox:
        first = Study(sandbox, _folder(name, "alone"))
        first.lorabench("run", first.sweep("sweep", SWEEP), "--device", "cpu", "--workers", "2")
        while time.monotonic() < end or not figures.rounds:
            _round(Study(sandbox, _folder(name, f"round{figures.rounds}")), first.store, random_, figures)
            sandbox.up()
            sandbox.clear()
            figures.rounds += 1
            say(f"cluster round {figures.rounds}: {dict(figures.kills)}, faults: {dict(figures.faults) or 0}")
    return figures


def _folder(parent: str, name: str) -> Path:
    folder = Path(parent) / name
    folder.mkdir()
    return folder


def _round(study: Study, alone: Store, random_: random.Random, figures: Figures) -> None:
    sweep = study.sweep("sweep", SWEEP)
    blows = Blows(study, random_)
    with Watch(study.store, figures):
        for submit in range(MOST_SUBMITS):
            figures.launches += 1
            study.submit(sweep, cells_per_job=random_.choice((1, 2)), checkpoint_seconds=1, minutes=30)
            for _ in range(random_.randint(1, MOST_BLOWS) if submit < MOST_SUBMITS // 2 else 0):
                time.sleep(random_.uniform(0.5, 6))
                name = random_.choice([*blows.all])
                if not _idle(study.sandbox) and blows.all[name]():
                    figures.kills[name] += 1
            if not _wait_until_idle(study.sandbox):
                figures.fault("hung", f"jobs are queued after {IDLE_SECONDS} s: {study.sandbox.queue()}")
                study.sandbox.clear()
            if all(state.status == Status.DONE for state in study.store.states()):
                break
    for kind, what in differences(study.store, alone):
        figures.fault(kind, what)


def _idle(sandbox: Sandbox) -> bool:
    return not [job for job in sandbox.queue() if job["partition"] == "main"]


def _wait_until_idle(sandbox: Sandbox) -> bool:
    deadline = time.monotonic() + IDLE_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(AssertionError):
            if _idle(sandbox):
                return True
        time.sleep(0.3)
    return False
