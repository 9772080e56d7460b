"""Run what is missing of a sweep.

Done runs are skipped, also those that another sweep made; interrupted ones go on from their checkpoint; failed
ones are left alone unless --retry names them. Ctrl-C stops cleanly: every run writes a checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lorabench.commands._arguments import DEVICE, LIMIT, PACK, RESULTS, RETRY, SET, SWEEP, argument, changes, number
from lorabench.terminal.text import talk

ARGUMENTS = [
    SWEEP,
    RESULTS,
    SET,
    LIMIT,
    argument(
        "--workers",
        "runs at a time (default: one a GPU, else as many as cores allow)",
        type=number(int, 1),
        metavar="N",
    ),
    argument(
        "--processes",
        "of each run, which share every batch among them: one a GPU where there are GPUs (default: 1)",
        type=number(int, 1),
        default=1,
        metavar="N",
    ),
    argument(
        "--sharding",
        "of a run over several processes: ddp copies the model, fsdp shares out its base weights (default: auto)",
        choices=["auto", "ddp", "fsdp"],
        default="auto",
    ),
    PACK,
    DEVICE,
    RETRY,
    argument("--live", "write event files below RESULTS/exports/tensorboard while runs train", choices=["tensorboard"]),
    argument("--timeout-minutes", "end a run as `timeout` after so long", type=number(float, 0.01), metavar="M"),
    argument(
        "--checkpoint-seconds",
        "write a checkpoint so often (default: 60)",
        type=number(float, 0),
        default=60.0,
        metavar="S",
    ),
]


def main(arguments: argparse.Namespace) -> int:
    from lorabench.api.run import run

    ran = run(
        Path(arguments.sweep),
        arguments.results,
        workers=arguments.workers,
        changes=changes(arguments.set),
        limit=arguments.limit,
        retry=arguments.retry,
        device=arguments.device,
        processes=arguments.processes,
        sharding=arguments.sharding,
        timeout_minutes=arguments.timeout_minutes,
        checkpoint_seconds=arguments.checkpoint_seconds,
        live=arguments.live,
        pack=arguments.pack,
    )
    talk(repr(ran))
    return ran.outcome.exit_code
