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


def start(root: Path, size: int, *specs: RunSpec, target: str = "execute_run") -> list[subprocess.Popen[str]]:
    (root / "specs.json").write_text(json.dumps([spec.to_json() for spec in specs]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "tests.team_task", str(root), target]
    tasks = []
    for rank in range(size):
        environment = {key: str(value) for key, value in (given | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        tasks.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment
            )
        )
    return tasks


def test_the_tasks_of_a_job_go_through_its_runs_together(tmp_path):
    specs = [make_spec(seed=seed, batch_size=5, epsilon=1e-5) for seed in (0, 1)]
    alone = run(tmp_path / "alone", 1, *specs)
    together = tmp_path / "together"
    together.mkdir()
    outputs = [task.communicate(timeout=120)[0] for task in start(together, 2, *specs)]
    assert outputs[0].splitlines()[-1] == "['done', 'done']", outputs
    assert [output.splitlines()[-1] for output in outputs[1:]] == ["followed"], outputs
    for spec, one in zip(specs, alone, strict=True):
        many = Store(together).read(spec.id)
        assert_same(tmp_path / "alone", one, together, many)
        assert many.environment["ranks"] == 2 and many.attempts == 1


def test_a_dead_process_of_another_task_is_accounted_for_and_the_next_run_begins(tmp_path):
    specs = [make_spec(seed=seed) for seed in (0, 1)]
    outputs = [task.communicate(timeout=120)[0] for task in start(tmp_path, 2, *specs, target="killed_with_seed_0")]
    assert outputs[0].splitlines()[-1] == "['cancelled', 'done']", outputs
    assert Store(tmp_path).read(specs[0].id).error == "rank 1: killed by signal 9; run again to resume"


def test_a_signal_to_the_first_task_stops_all(tmp_path):
    spec = make_spec(steps=5000)
    tasks = start(tmp_path, 2, spec)
    deadline = time.monotonic() + 60
    while not (Store(tmp_path).folder(spec.id) / "steps.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for task in tasks:
        task.send_signal(signal.SIGUSR2)
    outputs = [task.communicate(timeout=60)[0] for task in tasks]
    record = Store(tmp_path).read(spec.id)
    assert record.status == Status.CANCELLED and record.error == "stopped by SIGTERM; run again to resume", outputs
    assert outputs[1].splitlines()[-1] == "followed"


def test_when_the_first_task_dies_the_others_end(tmp_path):
    spec = make_spec(steps=5000)
    tasks = start(tmp_path, 2, spec)
    deadline = time.monotonic() + 60
    while not (Store(tmp_path).folder(spec.id) / "steps.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    tasks[0].kill()
    output, _ = tasks[1].communicate(timeout=60)
    assert "rank 0 is gone" in output
    deadline = time.monotonic() + 30
    while Store(tmp_path).state(spec.id).status == Status.RUNNING:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    tasks[0].wait()
