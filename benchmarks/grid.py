"""A grid by `lorabench run` beside a fresh Python process per cell.

Both run the same 16 cells (LoRA ranks × seeds, 100 steps each) to the same records, with the same number of CPU
cores: `lorabench run` in its normal way (processes forked from one that has imported everything), the peer by a
script per cell that imports, loads, trains, evaluates and saves: one after another, and as many at a time as there
are workers. The headline is the ratio to the latter, the quicker of the two.

    python benchmarks/grid.py                 # some minutes on 2 CPU cores
    python benchmarks/grid.py --device cuda   # on a GPU: one worker, its default there
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hardware import spread, write

from lorabench.processes.forks import SERVER_ENVIRONMENT
from lorabench.processes.machine import available_cores
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.sweep import read_sweep
from lorabench.store.store import Store

SWEEP = """
[base]
model = "{model}"
task.name = "text"
task.data = "builtin:python-code"
task.max_eval = 32
seq_len = {seq_len}
batch_size = {batch_size}
steps = {steps}
lr = 3e-3
method.name = "lora"

[[grid]]
method.rank = [1, 4, 16, 64]
seed = [0, 1, 2, 3]
"""
CELL = """
import json, sys
from pathlib import Path
from lorabench.spec.run_spec import RunSpec
from lorabench.store.store import Store
from lorabench.training.execute import Options, execute
spec = RunSpec.from_json(json.loads(sys.argv[1]))
sys.exit(str(execute(spec, Store(Path(sys.argv[2])), Options(device=sys.argv[3]))) != "done")
"""


def run_lorabench(sweep: Path, store: Store, arguments: argparse.Namespace) -> None:
    """`lorabench run`, start-up included."""
    places = ["--results", str(store.root), "--device", arguments.device, "--workers", str(arguments.workers)]
    command = [sys.executable, "-m", "lorabench", "run", str(sweep), *places]
    subprocess.run(command, check=True, capture_output=True)


def run_sequential(sweep: Path, store: Store, arguments: argparse.Namespace) -> None:
    run_processes(sweep, store, arguments, 1)


def run_concurrent(sweep: Path, store: Store, arguments: argparse.Namespace) -> None:
    run_processes(sweep, store, arguments, arguments.workers)


def run_processes(sweep: Path, store: Store, arguments: argparse.Namespace, workers: int) -> None:
    """A fresh process per cell, `workers` at a time, in the same thread settings as lorabench's own."""
    waiting = list(read_sweep(sweep).runs)
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(start_cell(waiting.pop(0), store, arguments.device))
        for process in [process for process in running if process.poll() is not None]:
            assert process.returncode == 0, "a cell has failed"
            running.remove(process)
        time.sleep(0.02)


def start_cell(spec: RunSpec, store: Store, device: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CELL, json.dumps(spec.to_json()), str(store.root), device]
    environment = {**SERVER_ENVIRONMENT, "OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


CONTENDERS: dict[str, Callable[[Path, Store, argparse.Namespace], None]] = {
    "lorabench": run_lorabench,
    "concurrent_processes": run_concurrent,
    "sequential_processes": run_sequential,
}


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of the whole grid, round by round, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(arguments.rounds):
        losses = {}
        for name, contender in CONTENDERS.items():
            if name == "sequential_processes" and number:
                continue  # the slowest of all, and no headline: once is enough
            with tempfile.TemporaryDirectory() as folder:
                sweep = Path(folder) / "grid.toml"
                sweep.write_text(SWEEP.format(**vars(arguments)))
                begin = time.perf_counter()
                contender(sweep, Store(Path(folder) / "results"), arguments)
                seconds[name].append(time.perf_counter() - begin)
                losses[name] = final_losses(sweep, Store(Path(folder) / "results"))
            print(f"{name}: {seconds[name][-1]:.1f} s", file=sys.stderr)
        check_same_work(losses, arguments.device)
    return seconds


def final_losses(sweep: Path, store: Store) -> dict[str, float]:
    found = {}
    for spec in read_sweep(sweep).runs:
        record = store.read(spec.id)
        assert record is not None and record.status == "done", f"{spec.id} is not done"
        found[spec.id] = record.measures["valid_loss"]
    return found


def check_same_work(losses: dict[str, dict[str, float]], device: str) -> None:
    """On the CPU the cells must end in the very same losses."""
    reference = losses["lorabench"]
    for name, found in losses.items():
        for run_id, loss in found.items():
            difference = abs(loss - reference[run_id])
            assert difference <= (0 if device == "cpu" else 1e-2), f"{name}: {run_id} ends {difference} away"


def parse() -> argparse.Namespace:
    import torch

    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="builtin:tiny-llama")
    parser.add_argument("--steps", default=100, type=int)
    parser.add_argument("--batch-size", default=2, type=int)
    parser.add_argument("--seq-len", default=64, type=int)
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--device", default="cuda" if gpu else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--workers", type=int, help="cells at a time (default: cores; 1 on a GPU)")
    arguments = parser.parse_args()
    arguments.workers = arguments.workers or (1 if arguments.device == "cuda" else available_cores())
    return arguments


def main() -> None:
    arguments = parse()
    seconds = measure(arguments)
    ratios: dict[str, Any] = {
        f"over_{peer}": spread([theirs / ours for theirs, ours in zip(times, seconds["lorabench"], strict=False)])
        for peer, times in seconds.items()
        if peer != "lorabench"
    }
    for peer, ratio in ratios.items():
        print(f"lorabench {peer}: {ratio['median']:.2f} times as fast (min {ratio['min']:.2f}, max {ratio['max']:.2f})")
    figures = {"headline": "over_concurrent_processes", "seconds": seconds, "lorabench": ratios}
    settings = {key: value for key, value in vars(arguments).items() if key != "device"} | {"cells": 16}
    print(write("grid", arguments.device, settings, figures))


if __name__ == "__main__":
    main()
