"""A task of a job, as SLURM would start it: launches the runs of a file on the ranks that its environment names.

What computes them is told as `module:function`, so that a supervisor imports no more than one of a job does.
"""

import importlib
import json
import sys
from pathlib import Path

from lorabench.launch import team
from lorabench.launch.pool import Pool
from lorabench.launch.worker import Settings
from lorabench.processes.distributed import Place
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.sweep import Sweep
from lorabench.store.store import Store


def main(root: str, target: str) -> None:
    specs = [RunSpec.from_json(table) for table in json.loads((Path(root) / "specs.json").read_text())]
    pool = Pool(settings=Settings(device="cpu", job="7"), check=False, preload=("lorabench.launch.preload",))
    module, _, function = target.partition(":")
    team.BEAT_SECONDS, team.GONE_SECONDS = 0.5, 6.0  # for the test of a dead supervisor
    sweep, compute = Sweep(name="job", text="", runs=tuple(specs)), getattr(importlib.import_module(module), function)
    outcome = team.launch_together(sweep, Store(Path(root)), pool, Place.from_environment(), compute)
    print("answer:", "followed" if outcome is None else [str(state.status) for state in outcome.states])


if __name__ == "__main__":
    main(*sys.argv[1:])
