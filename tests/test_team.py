"""Runs on the tasks of a job, each task a process with the environment that submitit would give it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from lorabench.record import Status, Store
from lorabench.spec import RunSpec
from tests.conftest import make_spec
from tests.test_ranks import assert_same, run

PATIENCE_SECONDS = 240
"""For machines that do much else."""


class Tasks:
    """So many tasks of a job, which computes these runs; whatever is left of them is killed at the end."""

    def __init__(self, root: Path, size: int, *specs: RunSpec, target: str = "execute_run", taken: bool = False):
        root.mkdir(exist_ok=True)
        (root / "specs.json").write_text(json.dumps([spec.to_json() for spec in specs]))
        self.store, self.port = Store(root), socket.create_server(("127.0.0.1", 0))
        port = self.port.getsockname()[1]
        if not taken:
            self.port.close()
        given = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "tests.team_task", str(root), target]
        self.processes = [
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {k: str(v) for k, v in (given | {"RANK": rank, "LOCAL_RANK": rank}).items()},
            )
            for rank in range(size)
        ]

    def __enter__(self) -> Tasks:
        return self

    def __exit__(self, *_: object) -> None:
        self.port.close()
        for process in self.processes:
            process.kill()
            process.communicate()

    def wait_for_training(self, spec: RunSpec) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (self.store.folder(spec.id) / "steps.jsonl").exists():
            assert time.monotonic() < deadline and self.processes[0].poll() is None
            time.sleep(0.1)

    def last_lines(self) -> list[str]:
        """What each task has printed last."""
        outputs = [process.communicate(timeout=PATIENCE_SECONDS)[0] for process in self.processes]
        return [output.splitlines()[-1] for output in outputs]


def test_the_tasks_of_a_job_go_through_its_runs_together(tmp_path):
    """Somebody else listens on their port."""
    specs = [make_spec(seed=seed, batch_size=5, epsilon=1e-5) for seed in (0, 1)]
    alone = run(tmp_path / "alone", 1, *specs)
    with Tasks(tmp_path / "together", 2, *specs, taken=True) as tasks:
        assert tasks.last_lines() == ["['done', 'done']", "followed"]
    for spec, one in zip(specs, alone, strict=True):
        many = tasks.store.read(spec.id)
        assert_same(tmp_path / "alone", one, tmp_path / "together", many)
        assert many.environment["ranks"] == 2 and many.attempts == 1


def test_a_dead_process_of_another_task_is_accounted_for_and_the_next_run_begins(tmp_path):
    specs = [make_spec(seed=seed) for seed in (0, 1)]
    with Tasks(tmp_path, 2, *specs, target="killed_with_seed_0") as tasks:
        assert tasks.last_lines() == ["['cancelled', 'done']", "followed"]
    assert tasks.store.read(specs[0].id).error == "rank 1: killed by signal 9; run again to resume"


def test_a_signal_to_the_job_stops_all_of_its_tasks(tmp_path):
    spec = make_spec(steps=5000)
    with Tasks(tmp_path, 2, spec) as tasks:
        tasks.wait_for_training(spec)
        for process in tasks.processes:
            process.send_signal(signal.SIGUSR2)
        assert tasks.last_lines() == ["['cancelled']", "followed"]
    assert tasks.store.read(spec.id).error == "stopped by SIGTERM; run again to resume"
    assert (tasks.store.folder(spec.id) / "checkpoint" / "state.pt").exists()


def test_when_the_first_task_dies_the_others_end(tmp_path):
    spec = make_spec(steps=5000)
    with Tasks(tmp_path, 2, spec) as tasks:
        tasks.wait_for_training(spec)
        tasks.processes[0].kill()
        output, _ = tasks.processes[1].communicate(timeout=PATIENCE_SECONDS)
        assert "rank 0 is gone" in output
        deadline = time.monotonic() + PATIENCE_SECONDS
        while tasks.store.state(spec.id).status == Status.RUNNING:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_when_another_task_dies_its_run_can_be_resumed_and_no_further_one_begins(tmp_path):
    specs = [make_spec(steps=5000, seed=seed) for seed in (0, 1)]
    with Tasks(tmp_path, 2, *specs) as tasks:
        tasks.wait_for_training(specs[0])
        tasks.processes[1].kill()
        output, _ = tasks.processes[0].communicate(timeout=PATIENCE_SECONDS)
        assert output.splitlines()[-1] == "['cancelled', 'missing']"
