"""A real SLURM for the tests, and what can happen to it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

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

    def fail_controller(self) -> None:
        """slurmctld dies; the nodes and their jobs go on. `up` brings it back."""
        process = int((self.folder / "pid" / "slurmctld").read_text())
        os.kill(process, signal.SIGKILL)
        while Path(f"/proc/{process}").exists() and "Z" not in Path(f"/proc/{process}/stat").read_text():
            time.sleep(0.05)

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


def send(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)
