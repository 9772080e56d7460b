"""A real SLURM for the tests, and lorabench's commands as a user calls them on its login node."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorabench.record import RunRecord, Status, Store

ROOT = Path(__file__).parents[1]
REQUIRED = "LORABENCH_TEST_SLURM"
"""Where this is set, as `.ci/run` does, a SLURM that cannot be had is a failure; else its tests are skipped."""


class Sandbox:
    """A SLURM of its own, on free ports, that `slurm/sandbox/up` has started with these flags."""

    def __init__(self, *flags: str):
        self.flags = flags
        self.folder = Path(
            tempfile.mkdtemp(prefix="slurm-", dir="/tmp")
        )  # not below pytest's: sockets' paths are short
        self.environment = os.environ | {
            "SLURM_SANDBOX": str(self.folder),
            "SLURM_SANDBOX_PORT": str(free_ports(5)),
            "SLURM_CONF": str(self.folder / "etc" / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def up(self) -> None:
        """Start it, or what has died of it. Raises RuntimeError with what it said."""
        done = self._script("up", *self.flags)
        if done.returncode:
            raise RuntimeError(done.stdout)

    def down(self) -> None:
        self._script("down")
        shutil.rmtree(self.folder)

    def _script(self, name: str, *flags: str) -> subprocess.CompletedProcess[str]:
        command = [ROOT / "slurm" / "sandbox" / name, *flags]
        return subprocess.run(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
        )

    def call(self, *command: str) -> str:
        """What one of SLURM's commands prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def queue(self) -> list[dict[str, str]]:
        """What squeue shows, one element of an array a row."""
        lines = self.call("squeue", "-h", "-r", "-o", "%i|%T|%P|%N|%r").splitlines()
        return [
            dict(zip(("id", "state", "partition", "node", "reason"), line.split("|", 4), strict=True)) for line in lines
        ]

    def clear(self) -> None:
        """Cancel every job, and wait until all are gone."""
        self.call("scancel", "--user=root")
        deadline = time.monotonic() + 60
        while self.queue() and time.monotonic() < deadline:
            time.sleep(0.2)

    def preempt(self) -> None:
        """Take both nodes for a job of the higher partition."""
        self.call("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")

    def fail_node(self, node: str) -> None:
        """The node dies: its daemon, and what its jobs have there. `up` brings it back."""
        os.kill(int((self.folder / "pid" / f"slurmd.{node}").read_text()), signal.SIGKILL)
        for process in [*self.managers(node), *self.tasks(node)]:
            send(process, signal.SIGKILL)

    def managers(self, node: str) -> list[int]:
        """The processes that start, watch and end the steps of the node's jobs."""
        ids = self._raw_ids(node)
        return [pid for pid, command, _ in self._processes() if re.match(rf"slurmstepd: \[({ids})\.", command)]

    def tasks(self, node: str) -> list[int]:
        """All processes of the node's jobs, those of the batch script apart."""
        ids = self._raw_ids(node)
        return [pid for pid, _, job in self._processes() if re.fullmatch(ids, job)]

    def _raw_ids(self, node: str) -> str:
        """As a regular expression, the ids that the node's jobs go by in their own environment."""
        lines = self.call("squeue", "-h", "-r", "-w", node, "-o", "%A").split()
        return "|".join(lines) or "none"

    def _processes(self) -> Iterator[tuple[int, str, str]]:
        """Process, command line, and id of its job, of this cluster's steps."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                lines = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                environment = dict(line.split("=", 1) for line in lines if "=" in line)
                command = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                if environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    yield (
                        int(folder.name),
                        command,
                        environment["SLURM_JOB_ID"] if "SLURM_STEP_ID" in environment else "",
                    )

    @property
    def keeps_memory_limits(self) -> bool:
        return "task/cgroup" in (self.folder / "etc" / "slurm.conf").read_text()


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nothing listens on."""
    start = 20000 + os.getpid() % 2000 * 5  # apart from what a process beside this one looks at
    for first in range(start, 32000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError("no free ports")


@contextlib.contextmanager
def started(*flags: str) -> Iterator[Sandbox]:
    """A SLURM for the tests of a file; they are skipped where there can be none, or fail where there has to be one."""
    problem = missing(flags)
    if problem and os.environ.get(REQUIRED) != "1":
        pytest.skip(f"no real SLURM: {problem} ({REQUIRED}=1 installs what it needs)")
    sandbox = Sandbox(*flags)
    try:
        sandbox.up()
        yield sandbox
    finally:
        sandbox.down()


def missing(flags: tuple[str, ...]) -> str | None:
    """Why no SLURM can be started here, as far as can be told without trying."""
    if os.geteuid() != 0:
        return "its daemons run as root"
    programs = ["munged", "slurmctld", "slurmd", "srun"]
    programs += [] if "--no-accounting" in flags else ["slurmdbd", "mariadbd"]
    absent = [program for program in programs if not shutil.which(program)]
    return f"{', '.join(absent)} not installed" if absent else None


class Study:
    """A results folder on the cluster, and one user's commands there."""

    def __init__(self, sandbox: Sandbox, folder: Path):
        self.sandbox, self.folder = sandbox, folder
        self.store = Store(folder / "results")

    def sweep(self, name: str, text: str) -> Path:
        file = self.folder / f"{name}.toml"
        file.write_text(text)
        return file

    def profile(self, **keys: Any) -> Path:
        """A cluster profile; every job is small and on the CPU unless `keys` say otherwise."""
        table = {"partition": "main", "gpus": 0, "cpus": 1, "minutes": 60, "cells_per_job": 1, **keys}
        file = self.folder / "cluster.toml"
        file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items()))
        return file

    def start(self, *command: str | Path) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "lorabench", *map(str, command)]
        return subprocess.Popen(
            line,
            env=self.sandbox.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def lorabench(self, *command: str | Path, code: int = 0) -> str:
        """What it prints on stdout; fails where its exit code is another."""
        process = self.start(*command)
        out, talk = process.communicate(timeout=300)
        assert process.returncode == code, f"lorabench {' '.join(map(str, command))}: {process.returncode}\n{out}{talk}"
        self.talk = talk
        return out

    def submit(self, sweep: Path, *options: str, **profile: Any) -> str:
        return self.lorabench("submit", sweep, "--cluster", self.profile(**profile), *options)

    def status(self) -> dict[str, dict[str, Any]]:
        """Run id -> its row of `lorabench status --json`."""
        rows = json.loads(self.lorabench("status", "results", "--json"))["runs"]
        return {row["run_id"]: row for row in rows}

    def statuses(self) -> set[str]:
        return {row["status"] for row in self.status().values()}

    def record(self, run_id: str) -> RunRecord:
        record = self.store.read(run_id)
        assert record is not None
        return record

    def wait_until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Fails with all that can be known if it does not come to hold in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"not within {seconds:.0f} s\n{self.explain()}", pytrace=True)
            time.sleep(0.2)

    def wait_until_idle(self, seconds: float = 120) -> None:
        """Until no job of the partition `main` is queued any more."""
        self.wait_until(lambda: not [job for job in self.sandbox.queue() if job["partition"] == "main"], seconds)

    def running(self, steps: int = 2) -> bool:
        """Whether some run has begun to train."""
        claims = [state.claim for state in self.store.states() if state.status == Status.RUNNING]
        return any(claim and claim.progress.get("step", 0) >= steps for claim in claims)

    def explain(self) -> str:
        parts = [f"squeue: {self.sandbox.queue()}"]
        with contextlib.suppress(Exception):
            parts += [self.lorabench("status", "results")]
        for file in sorted(self.folder.rglob("*")):
            if file.is_file() and file.suffix in (".out", ".err", ".txt"):
                parts += [f"--- {file}\n{file.read_text(errors='replace')[-3000:]}"]
        return "\n".join(parts)


@contextlib.contextmanager
def slowed(store: Store) -> Iterator[None]:
    """The runs go on at a tenth of their speed, and at a fiftieth once they train: time to do something to them."""
    over = threading.Event()

    def pace() -> None:
        while not over.is_set():
            claims = [state.claim for state in store.states() if state.status == Status.RUNNING]
            live = [claim for claim in claims if claim and claim.is_alive()]
            for claim in live:
                send(claim.pid, signal.SIGSTOP)
            training = any(claim.progress.get("step", 0) >= 2 for claim in live)
            over.wait(0.98 if training else 0.45)
            for claim in live:
                send(claim.pid, signal.SIGCONT)
            time.sleep(0.02 if training else 0.05)

    thread = threading.Thread(target=pace)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def send(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def assert_same(got: Store, want: Store, run_ids: list[str] | None = None) -> None:
    """Every run is done, and bit for bit what `want` has: what it learned, its losses, every step's line."""
    for run_id in run_ids or want.run_ids():
        ours, theirs = got.read(run_id), want.read(run_id)
        assert ours and theirs and ours.status == theirs.status == Status.DONE
        assert ours.files == theirs.files and ours.files
        metrics = [name for name in theirs.measures if name.endswith("_loss")]
        assert {name: ours.measures[name] for name in metrics} == {name: theirs.measures[name] for name in metrics}
        steps = [(store.folder(run_id) / "steps.jsonl").read_text() for store in (got, want)]
        assert steps[0] == steps[1] and steps[0]


def attempts(store: Store) -> dict[str, int]:
    """How often each run was taken up by a worker."""
    return {run_id: len(list((store.folder(run_id) / "claims").glob("*.json"))) for run_id in store.run_ids()}
