"""How long a sweep of 10,000 runs takes to plan, submit and list, and a real SLURM for an array of small runs.

`plan`, `submit --dry-run`, and `status` on a store in which nothing, half and all of the sweep is done, each a process
of its own, called as a user calls it, start-up included. Where `SLURM_CONF` names a cluster that answers (as after
slurm/sandbox/up), the sweep's first runs, of one step each, are submitted there and computed, many in a job.

    python benchmarks/cluster.py                    # some minutes on 2 CPU cores
    python benchmarks/cluster.py --seeds 10         # 1,000 runs
    python benchmarks/cluster.py --array 500        # and 500 of them through SLURM
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from hardware import write
from store import timed

from lorabench.spec.run_spec import RunSpec
from lorabench.spec.sweep import read_sweep
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store

SWEEP = """
[base]
model = "builtin:tiny-llama"
task.name = "text"
task.data = "builtin:python-code"
task.max_train = 16
task.max_eval = 4
seq_len = 32
batch_size = 2
steps = 1
serving = false
method.name = "lora"
method.rank = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16]
lr = [1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2]
seed = {seeds}
"""
PROFILE = """
kind = "slurm"
gpus = 0
cpus = 1
minutes = 60
parallel = {parallel}
cells_per_job = {cells_per_job}
"""


def make_run(store: Store, spec: RunSpec) -> None:
    """A run that is done, as far as `status` reads it."""
    folder = store.folder(spec.id)
    folder.mkdir(parents=True)
    measures = {"valid_loss": 3.0, "tokens_per_second": 1000.0, "total_seconds": 2.0}
    record = RunRecord(run_id=spec.id, spec=spec.to_json(), status=Status.DONE, measures=measures)
    (folder / "spec.json").write_text(json.dumps(spec.to_json()))  # not synced: 10,000 take minutes
    (folder / "record.json").write_text(json.dumps(record.to_json()))


def commands(root: Path, num_seeds: int) -> dict[str, Any]:
    """Seconds of each command; the sweep is done in three steps: not at all, half, whole."""
    sweep_file, profile, store = root / "grid.toml", root / "cluster.toml", Store(root / "results")
    sweep_file.write_text(SWEEP.format(seeds=list(range(num_seeds))))
    profile.write_text(PROFILE.format(parallel=50, cells_per_job='"auto"'))
    specs = read_sweep(sweep_file).runs
    results = ["--results", str(store.root)]
    (store.root / "runs").mkdir(parents=True)
    figures = {}
    for share in (0.0, 0.5, 1.0):
        for spec in specs[: round(share * len(specs))]:
            if not store.folder(spec.id).exists():
                make_run(store, spec)
        name = f"{share:.0%} done"
        submit = ["submit", str(sweep_file), "--cluster", str(profile), "--dry-run"]
        figures[name] = {
            "plan": timed(f"plan, {name}", "plan", str(sweep_file), "--device", "cpu", *results),
            "dry_run": timed(f"submit --dry-run, {name}", *submit, *results),
            "status": timed(f"status, {name}", "status", str(store.root)),
        }
    return {"runs": len(specs), "commands": figures}


def array(root: Path, num_runs: int, cells_per_job: int, parallel: int) -> dict[str, Any]:
    """The sweep's first runs through SLURM: how long until all are done, and `status` while they wait and run."""
    sweep, profile, results = root / "array.toml", root / "array-cluster.toml", root / "array"
    sweep.write_text(SWEEP.format(seeds=list(range(-(-num_runs // 100)))))
    profile.write_text(PROFILE.format(parallel=parallel, cells_per_job=cells_per_job))
    begin = time.perf_counter()
    figures: dict[str, Any] = {"runs": len(read_sweep(sweep).runs), "cells_per_job": cells_per_job}
    submit = ["submit", str(sweep), "--cluster", str(profile), "--results", str(results)]
    figures["submit"] = timed("submit", *submit)
    figures["status"] = timed("status, all queued", "status", str(results))
    subprocess.run(
        [sys.executable, "-m", "lorabench", "status", str(results), "--watch", "5"],
        check=True, stdout=subprocess.DEVNULL, env=os.environ,
    )  # fmt: skip
    figures["seconds"] = time.perf_counter() - begin
    store = Store(results)
    records = [store.read(run_id) for run_id in store.run_ids()]
    assert all(record and record.status == Status.DONE and record.attempts == 1 for record in records)
    assert len(records) == figures["runs"]
    figures["seconds_per_run"] = figures["seconds"] / len(records)
    print(f"{len(records)} runs through SLURM: {figures['seconds']:.0f} s", file=sys.stderr)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", default=100, type=int, help="a hundred runs each (default: 100)")
    parser.add_argument("--array", default=0, type=int, help="so many runs, in hundreds, through SLURM (default: none)")
    parser.add_argument("--cells-per-job", default=50, type=int)
    parser.add_argument("--parallel", default=2, type=int, help="jobs at a time")
    arguments = parser.parse_args()
    settings = vars(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        figures = commands(Path(temporary), arguments.seeds)
        if arguments.array:
            figures["array"] = array(Path(temporary), arguments.array, arguments.cells_per_job, arguments.parallel)
    print(write("cluster", "cpu", settings, figures))


if __name__ == "__main__":
    main()
