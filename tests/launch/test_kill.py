"""SIGKILL at any moment, of a run or of the launcher: running again gives the same bits as a run left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from lorabench.spec.sweep import read_sweep
from lorabench.store.record import Status
from lorabench.store.store import Store

SWEEP = """
[base]
model = "builtin:tiny-llama"
task.name = "text"
task.data = "builtin:python-code"
task.retain = "builtin:english-docs"
task.max_train = 64
task.max_eval = 8
seq_len = 64
batch_size = 2
steps = 80
eval_every = 40
serving = false

[[grid]]
method.name = "lora"
method.rank = 2
method.dropout = 0.1

[[grid]]
method.name = "full"

[[grid]] # images, with augmentation
model = "builtin:tiny-vit"
task.name = "image_classification"
task.data = "builtin:digits-turned"
task.retain = "builtin:digits"
task.max_train = 64
task.max_eval = 8
task.shift = 0.1
steps = 60
method.name = "full"

[[grid]] # a diffusion model, whose noise is drawn at each step
model = "builtin:tiny-diffusion"
task.name = "denoising"
task.data = "builtin:digits-outlined"
task.condition = "label"
task.retain = "builtin:digits-16"
task.max_train = 64
task.max_eval = 8
task.pictures = { prompts = ["3"], each = 1, steps = 2 }
method.name = "lora"
method.rank = 2
steps = 40
"""


def start(sweep: Path, results: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "lorabench", "run", str(sweep), "--results", str(results), "--workers", "2"]
    return subprocess.Popen(
        [*command, "--device", "cpu", "--checkpoint-seconds", "0.3"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill_within(store: Store, process: subprocess.Popen, launcher: bool, random_: random.Random, most: float) -> int:
    """Kill the workers up to `most` seconds after each has begun its work, or the launcher; how many were killed."""
    killed, waiting = 0, {run_id: random_.uniform(0.1, most) for run_id in store.run_ids()}
    seen: dict[int, float] = {}
    while process.poll() is None:
        for state in store.states():
            claim = state.claim
            if claim is None or not claim.is_alive() or claim.pid == process.pid or state.run_id not in waiting:
                continue
            seen.setdefault(claim.pid, time.monotonic())
            if time.monotonic() - seen[claim.pid] > waiting[state.run_id]:
                os.kill(process.pid if launcher else claim.pid, signal.SIGKILL)
                killed += 1
                del waiting[state.run_id]
        time.sleep(0.02)
    return killed


def test_killed_runs_end_with_the_same_bits(tmp_path):
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(SWEEP)
    specs = read_sweep(sweep).runs
    alone, battered = Store(tmp_path / "alone"), Store(tmp_path / "battered")
    assert start(sweep, alone.root).wait(300) == 0
    for spec in specs:
        battered.write_spec(spec)
    random_, killed = random.Random(5), 0
    for attempt, most in enumerate((0.5, 1.5, 4.0)):  # at first so early that no machine has ended a run before
        process = start(sweep, battered.root)
        killed += kill_within(battered, process, launcher=attempt == 2, random_=random_, most=most)
        for state in battered.states():
            while state.status == Status.RUNNING:  # an orphan writes its checkpoint and stops
                time.sleep(0.1)
                state = battered.state(state.run_id)
    assert killed >= 3
    assert start(sweep, battered.root).wait(300) == 0
    for spec in specs:
        want, got = alone.read(spec.id), battered.read(spec.id)
        assert got.status == Status.DONE and got.attempts > 1
        assert got.files == want.files and got.pictures_sha256 == want.pictures_sha256
        metrics = ("valid_loss", "test_loss", "train_loss", "retain_loss_after", "base_valid_loss")
        assert {name: got.measures[name] for name in metrics} == {name: want.measures[name] for name in metrics}
        steps = [
            (battered.folder(spec.id) / "steps.jsonl").read_text(),
            (alone.folder(spec.id) / "steps.jsonl").read_text(),
        ]
        assert steps[0] == steps[1]
