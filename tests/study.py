"""A user's work on a real SLURM: sweeps, profiles, lorabench's commands, and what their results must be."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lorabench import cli
from lorabench.spec.sweep import read_sweep
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from lorabench.training.execute import Options, execute
from tests.sandbox import Sandbox, send

BASE = """
[base]
model = "builtin:tiny-llama"
task.name = "text"
task.data = "builtin:python-code"
task.max_train = 64
task.max_eval = 8
seq_len = 64
batch_size = 2
lr = 1e-2
serving = false
method.name = "lora"
method.dropout = 0.1
"""
SHORT = BASE + "steps = 12\n[[grid]]\nmethod.rank = [1, 2, 4]\n"
"""Three runs of a second."""
LONG = BASE + "steps = 80\n[[grid]]\nmethod.rank = 2\nseed = [0, 1]\n"
"""Two runs of some seconds, to be interrupted: of a minute and more while they are `slowed`."""
POLL_SECONDS = 0.5
"""Between two looks at what is waited for: each is a process, and SLURM's work."""


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
        """A cluster profile; every job is small and on the CPU unless `keys` say otherwise.

        Nothing is packed: whichever runs are left when a job is killed, they have to end with the bits of runs alone.
        """
        table = {"partition": "main", "gpus": 0, "cpus": 1, "minutes": 60, "cells_per_job": 1, "pack": "off", **keys}
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
        out, self.talk = process.communicate(timeout=300)
        return self._checked(command, process.returncode, code, out)

    def _checked(self, command: tuple[str | Path, ...], got: int, want: int, out: str) -> str:
        assert got == want, f"lorabench {' '.join(map(str, command))}: {got}\n{out}{self.talk}"
        return out

    def submit(self, sweep: Path, *options: str, code: int = 0, **profile: Any) -> str:
        """`lorabench submit` in this process, which has imported already what takes longer than all else."""
        command = ("submit", sweep, "--cluster", self.profile(**profile), *options)
        out, talk = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, self.sandbox.environment),
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(talk),
        ):
            got = cli.main([*map(str, command)])
        self.talk = talk.getvalue()
        return self._checked(command, got, code, out.getvalue())

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

    def kill_jobs(self) -> None:
        """`kill -9` of all processes of the only node that has jobs, those of their batch scripts apart."""
        (node,) = {job["node"] for job in self.sandbox.queue()}
        for process in self.sandbox.tasks(node):
            os.kill(process, signal.SIGKILL)

    def wait_until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Fails with all that can be known if it does not come to hold in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"not within {seconds:.0f} s\n{self.explain()}", pytrace=True)
            time.sleep(POLL_SECONDS)

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


def computed_here(study: Study, text: str, processes: int = 1) -> Store:
    """What comes of a sweep on this machine: in this process, or by `lorabench run` with several a run."""
    sweep = study.sweep("here", text)
    if processes > 1:
        study.lorabench("run", sweep, "--device", "cpu", "--workers", "1", "--processes", str(processes))
    else:
        for spec in read_sweep(sweep).runs:
            assert execute(spec, study.store, Options(device="cpu")) == Status.DONE
    return study.store
