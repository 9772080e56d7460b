"""A grid by `lorabench run` beside a plain PEFT script per cell, and beside itself without packing.

All compute the same cells (LoRA ranks x seeds) with the same number of CPU cores: `lorabench run` in its normal way,
which packs small cells; `lorabench run --pack off`; and a script per cell that imports nothing of lorabench
(`peft_script.py`), as many at a time as lorabench has workers, with the same thread settings. The headline is the ratio
to the scripts. That all do the same work is checked: each cell has to end in the same validation loss.

    python benchmarks/grid.py                    # 16 cells; some minutes on 2 CPU cores
    python benchmarks/grid.py --seeds 16         # 64 cells
    python benchmarks/grid.py --device cuda      # on a GPU: one worker, its default there
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hardware import spread, write

from lorabench.models.base_model import BUILTIN, resolve
from lorabench.processes.forks import SERVER_ENVIRONMENT
from lorabench.processes.machine import available_cores
from lorabench.spec.run_spec import RunSpec, method_seed
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
serving = false
method.name = "lora"

[[grid]]
method.rank = [1, 4, 16, 64]
seed = {seeds}
"""
TOLERANCE = {"cpu": 1e-3, "cuda": 1e-2}
"""Relative, of a cell's validation loss: the packed cells' agree to 1e-5, the scripts' mean is one over batches."""


def run_lorabench(sweep: Path, root: Path, arguments: argparse.Namespace, pack: str) -> dict[str, float]:
    """`lorabench run`, start-up included; each cell's validation loss."""
    places = ["--results", str(root), "--device", arguments.device, "--workers", str(arguments.workers)]
    command = [sys.executable, "-m", "lorabench", "run", str(sweep), *places, "--pack", pack]
    subprocess.run(command, check=True, capture_output=True)
    found = {}
    for spec in read_sweep(sweep).runs:
        record = Store(root).read(spec.id)
        assert record is not None and record.status == "done", f"{spec.id} is not done"
        found[spec.id] = record.measures["valid_loss"]
    return found


def run_scripts(sweep: Path, root: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """A script per cell, as many at a time as lorabench has workers."""
    specs = read_sweep(sweep).runs
    waiting, running = list(specs), []
    while waiting or running:
        while waiting and len(running) < arguments.workers:
            spec = waiting.pop(0)
            running.append(start_script(spec, root / spec.id, arguments.device))
        for process in [process for process in running if process.poll() is not None]:
            assert process.returncode == 0, "a script has failed"
            running.remove(process)
        time.sleep(0.02)
    return {spec.id: json.loads((root / spec.id / "result.json").read_text())["valid_loss"] for spec in specs}


def start_script(spec: RunSpec, out: Path, device: str) -> subprocess.Popen[bytes]:
    given = {
        "model": resolve(spec.model),
        "data": str(BUILTIN / "python-code"),
        "rank": spec.flat["method.rank"],
        "init_seed": method_seed(spec),
        "warmup_steps": math.ceil(spec.warmup * spec.steps - 1e-9),
        "max_eval": spec.task.max_eval,
        "device": device,
        "out": str(out),
    } | {key: getattr(spec, key) for key in ("seed", "lr", "steps", "batch_size", "seq_len")}
    command = [sys.executable, str(Path(__file__).with_name("peft_script.py")), json.dumps(given)]
    environment = {**SERVER_ENVIRONMENT, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


CONTENDERS: dict[str, Callable[[Path, Path, argparse.Namespace], dict[str, float]]] = {
    "lorabench": partial(run_lorabench, pack="auto"),
    "pack_off": partial(run_lorabench, pack="off"),
    "peft_scripts": run_scripts,
}


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of the whole grid, round by round, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(arguments.rounds):
        losses = {}
        for name, contender in CONTENDERS.items():
            with tempfile.TemporaryDirectory() as folder:
                sweep = Path(folder) / "grid.toml"
                sweep.write_text(SWEEP.format(**vars(arguments) | {"seeds": [*range(arguments.seeds)]}))
                begin = time.perf_counter()
                losses[name] = contender(sweep, Path(folder) / "results", arguments)
                seconds[name].append(time.perf_counter() - begin)
            print(f"{name}: {seconds[name][-1]:.1f} s", file=sys.stderr)
        check_same_work(losses, arguments.device)
    return seconds


def check_same_work(losses: dict[str, dict[str, float]], device: str) -> None:
    for name, found in losses.items():
        for run_id, loss in found.items():
            apart = abs(loss / losses["lorabench"][run_id] - 1)
            assert apart <= TOLERANCE[device], f"{name}: {run_id} ends {apart:.1e} away"


def parse() -> argparse.Namespace:
    import torch

    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="builtin:tiny-llama")
    parser.add_argument("--steps", default=100, type=int)
    parser.add_argument("--batch-size", default=2, type=int)
    parser.add_argument("--seq-len", default=64, type=int)
    parser.add_argument("--seeds", default=4, type=int, help="of each of 4 ranks")
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
    figures = {"headline": "over_peft_scripts", "seconds": seconds, "lorabench": ratios}
    cells = 4 * arguments.seeds
    settings = {key: value for key, value in vars(arguments).items() if key != "device"} | {"cells": cells}
    print(write("grid" if cells == 16 else f"grid-{cells}", arguments.device, settings, figures))


if __name__ == "__main__":
    main()
