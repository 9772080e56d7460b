"""Runs on the tasks of a job, each task a process with the environment that submitit would give it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from lorabench.launch import team
from lorabench.launch.pool import Pool
from lorabench.launch.worker import execute_run
from lorabench.processes.distributed import Place
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.sweep import Sweep
from lorabench.store.record import Status
from lorabench.store.store import Store
from tests.conftest import make_spec
from tests.training.test_ranks import SAME, assert_same, killed_with_seed_0, run

PATIENCE_SECONDS = 240
"""For machines that do much else."""
EXECUTE, DIES_FIRST = (f"{target.__module__}:{target.__name__}" for target in (execute_run, killed_with_seed_0))


class Tasks:
    """So many tasks of a job, which computes these runs; whatever is left of them is killed at the end."""

    def __init__(self, root: Path, size: int, *specs: RunSpec, target: str = EXECUTE, taken: bool = False):
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

    def answers(self) -> list[str]:
        """What each task says of its end."""
        outputs = [process.communicate(timeout=PATIENCE_SECONDS)[0] for process in self.processes]
        return [answer(output) for output in outputs]


def answer(output: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith("answer: ")]
    return line.removeprefix("answer: ")


def test_the_tasks_of_a_job_go_through_its_runs_together(tmp_path):
    """Somebody else listens on their port, a process of the first run dies, and a signal to the job ends the last."""
    dies, lives, lasts = specs = [make_spec(**SAME, seed=0), make_spec(**SAME, seed=1), make_spec(steps=5000, seed=2)]
    (alone,) = run(tmp_path / "alone", 1, lives)
    with Tasks(tmp_path / "together", 2, *specs, target=DIES_FIRST, taken=True) as tasks:
        tasks.wait_for_training(lasts)
        for process in tasks.processes:
            process.send_signal(signal.SIGUSR2)
        assert tasks.answers() == ["['cancelled', 'done', 'cancelled']", "followed"]
    assert tasks.store.read(dies.id).error == "rank 1: killed by signal 9; run again to resume"
    together = tasks.store.read(lives.id)
    assert_same(tmp_path / "alone", alone, tmp_path / "together", together)
    assert together.environment["ranks"] == 2 and together.attempts == 1
    assert tasks.store.read(lasts.id).error == "stopped by SIGUSR2; run again to resume"
    assert (tasks.store.folder(lasts.id) / "checkpoint" / "state.pt").exists()


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
        assert answer(output) == "['cancelled', 'missing']"


def test_a_supervisor_is_heard_of_while_its_server_warms_up(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for key, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    first, warm = team.Team(Place(size=2)), threading.Event()
    monkeypatch.setattr(team, "start_server", lambda *_: warm.wait(PATIENCE_SECONDS))
    monkeypatch.setattr(team, "BEAT_SECONDS", 0.01)
    sweep = Sweep(name="job", text="", runs=())
    follower = team._Follower(sweep, Store(tmp_path), Pool(), Place(rank=1, size=2), execute_run)
    thread = threading.Thread(target=follower.go, daemon=True)
    thread.start()
    deadline, beats = time.monotonic() + 30, set()
    while len(beats) < 3 and time.monotonic() < deadline:
        beats |= {first.store.get("beat 1")} if first.store.check(["beat 1"]) else set()
        time.sleep(0.01)
    warm.set()
    first.__exit__()
    thread.join(30)
    assert len(beats) == 3 and not thread.is_alive()
