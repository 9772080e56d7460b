"""Write the runs that have ended for another tool: TensorBoard, Weights & Biases, MLflow, or as plain csv.

One run of theirs is a run of ours, with the spec (flat, as sweep files name its keys), the curves of steps.jsonl and
the measures of its record. Nothing goes over the network: W&B is written offline (`wandb sync` uploads), MLflow as a
file store. Exported again, a run takes the place of what was written of it before. Prints the folder.

Look at them:  tensorboard --logdir RESULTS/exports/tensorboard
               wandb sync RESULTS/exports/wandb/wandb/offline-run-*
               MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri RESULTS/exports/mlflow
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lorabench.commands._arguments import PLACE, argument, open_store, settle_place
from lorabench.config import plugins
from lorabench.config.decode import InputError
from lorabench.config.quote import show_path
from lorabench.terminal.text import talk, tell

ARGUMENTS = [
    *PLACE,
    argument("--to", "the tool", choices=plugins.names("exporters"), required=True),
    argument("-o --output", "where its files go (default: RESULTS/exports/TOOL)", type=Path, metavar="DIR"),
]


def main(arguments: argparse.Namespace) -> int:
    from lorabench.report.freshness import find_sweeps
    from lorabench.store.export import exported, exporter, folder

    settle_place(arguments)
    store = open_store(arguments.results)
    tool = exporter(arguments.to, "--to")
    sweep = find_sweeps(store, arguments.sweep)[0].read() if arguments.sweep else None
    states = list(store.states(list(sweep.runs) if sweep else None))
    runs = list(exported(store, states, sweep.name if sweep else store.root.resolve().name, talk))
    if not runs:
        raise InputError(f"{show_path(store.root)}: no run has ended: there is nothing to export")
    output = arguments.output or folder(store, arguments.to)
    output.mkdir(parents=True, exist_ok=True)
    tool.write(runs, output)
    left = len(states) - len(runs)
    talk(
        f"exported {len(runs)} run{'s' * (len(runs) > 1)}"
        + (f"; left out, not ended or damaged: {left}" if left else "")
    )
    tell(output)
    return 0
