"""From a command to its first training step, and to a plan, beside an older commit of lorabench itself.

`lorabench run` of one LoRA cell, until its log has its first step; the `plan` of a sweep of which no run has been done;
and a `plan` that ends in an error of the sweep. Each is a process of its own, called as a user calls it. The older
commit is checked out beside this one and runs with the same interpreter and packages; the two take turns.

    python benchmarks/startup.py                       # about 10 minutes on 2 CPU cores
    python benchmarks/startup.py --rounds 3 --before d0d0d50
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hardware import spread, write

ROOT = Path(__file__).parents[1]
BEFORE = "d0d0d50"
CELL = """
[base]
model = "builtin:tiny-llama"
task.name = "text"
task.data = "builtin:python-code"
task.max_train = 64
task.max_eval = 8
seq_len = 64
batch_size = 2
serving = false
method.name = "lora"
method.rank = 4
lr = 1e-3
"""
RUN = CELL + "steps = 1\n"
PLAN = CELL.replace("method.rank = 4", "method.rank = [2, 4, 8]") + "steps = 100\nseed = [0, 1]\n"
ERROR = CELL + 'steps = 10\nmethod.targets = "no_such_layer"\n'


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """The package as it was, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, folder], check=True)
        subprocess.run(["git", "-C", folder, "checkout", "--quiet", commit], check=True)
        yield Path(folder)


def call(package: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The command line of that package, and its environment."""
    return [sys.executable, "-m", "lorabench", *arguments], os.environ | {"PYTHONPATH": str(package)}


def first_step(package: Path, sweep: Path) -> dict[str, float]:
    """Wall seconds from the command to the first step in the run's log, and of the whole command."""
    with tempfile.TemporaryDirectory() as results:
        command, environment = call(package, "run", str(sweep), "--results", results, "--device", "cpu")
        begin, seen = time.perf_counter(), 0.0
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, cwd=results)
        while process.poll() is None:
            logs = Path(results).glob("runs/*/steps.jsonl")
            if not seen and any(log.stat().st_size for log in logs):
                seen = time.perf_counter() - begin
            time.sleep(0.005)
        whole = time.perf_counter() - begin
        if process.returncode or not seen:
            raise SystemExit(process.stderr.read().decode() if process.stderr else "no step was seen")
    return {"first_step_seconds": seen, "run_seconds": whole}


def plan(package: Path, sweep: Path, code: int) -> dict[str, float]:
    """Wall and CPU seconds of a plan that ends with this exit code."""
    with tempfile.TemporaryDirectory() as results:
        command, environment = call(package, "plan", str(sweep), "--results", results, "--device", "cpu")
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.run(command, env=environment, capture_output=True, cwd=results, text=True)
        whole, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode != code:
            raise SystemExit(process.stderr)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": whole, "cpu_seconds": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE, help="the older commit")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    rounds: dict[str, dict[str, list[float]]] = {}
    with checkout(arguments.before) as old, tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.toml" for name in ("run", "plan", "error")}
        for file, text in zip(files.values(), (RUN, PLAN, ERROR), strict=True):
            file.write_text(text)
        for number in range(arguments.rounds + 1):  # the first one compiles and reads from the disk
            packages = {"before": old, "now": ROOT}
            for which in sorted(packages, reverse=number % 2 == 0):
                package = packages[which]
                found = first_step(package, files["run"])
                found |= {f"plan_{name}": value for name, value in plan(package, files["plan"], 0).items()}
                found |= {f"error_{name}": value for name, value in plan(package, files["error"], 2).items()}
                for name, value in found.items():
                    if number:
                        rounds.setdefault(name, {}).setdefault(which, []).append(value)
                print(f"round {number} {which}: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))
    figures: dict[str, Any] = {}
    for name, sides in rounds.items():
        ratios = [now / before for now, before in zip(sides["now"], sides["before"], strict=True)]
        figures[name] = {which: spread(values) for which, values in sides.items()} | {"ratio": spread(ratios)}
        print(f"{name}: {figures[name]['ratio']['median']:.2f} x of {arguments.before}")
    settings = {"before": arguments.before, "rounds": arguments.rounds}
    print(write("startup", "cpu", settings, {"figures": figures}))


if __name__ == "__main__":
    main()
