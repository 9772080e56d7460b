"""Show the runs of a sweep, which are done, and what each will take.

For each run: trainable and total parameters (exact), estimated peak memory and time. `basis` says what an
estimate rests on: `measured` (this run is done), `similar runs` (a finished run of the same model on the same
kind of device corrects the formula) or `formula`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lorabench.commands._arguments import DEVICE, JSON, RESULTS, SWEEP, as_json, device_name, import_for_plan
from lorabench.terminal.text import tell

ARGUMENTS = [SWEEP, RESULTS, DEVICE, JSON]


def main(arguments: argparse.Namespace) -> int:
    from lorabench.processes.machine import visible_gpus
    from lorabench.spec.sweep import read_sweep
    from lorabench.store.store import Store

    sweep = read_sweep(Path(arguments.sweep))
    visible_gpus(device_name(arguments.device))  # says so where there is none
    import_for_plan()
    from lorabench.launch.plan import make_plan, plan_text

    result = make_plan(sweep, Store(arguments.results), device_name(arguments.device))
    tell(as_json(result) if arguments.json else plan_text(sweep, result))
    return 0
