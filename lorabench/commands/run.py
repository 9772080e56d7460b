"""Run what is missing of a sweep.

Done runs are skipped, also those that another sweep made; interrupted ones go on from their checkpoint; failed
ones are left alone unless --retry names them. Ctrl-C stops cleanly: every run writes a checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.commands._arguments import DEVICE, RESULTS, RETRY, SWEEP, argument, device_name, number, statuses
from lorabench.config.decode import InputError
from lorabench.terminal.text import talk

if TYPE_CHECKING:
    from lorabench.store.record import Status

ARGUMENTS = [
    SWEEP,
    RESULTS,
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
    from lorabench.config.durable import write_bytes
    from lorabench.launch.pool import check_writable, launch, summary
    from lorabench.spec.sweep import read_sweep
    from lorabench.store.export import exporter
    from lorabench.store.store import Store

    retry = statuses(arguments.retry)
    device = device_name(arguments.device)
    if arguments.live:
        exporter(arguments.live, "--live")  # says so where it is not installed
    sweep = read_sweep(Path(arguments.sweep))
    store = Store(arguments.results)
    check_writable(store.root)
    write_bytes(store.root / sweep.name / "sweep.toml", sweep.text.encode())
    for spec in sweep.runs:
        store.uncancel(spec.id)
    outcome = launch(sweep, store, _pool(arguments, device, retry, max(spec.threads for spec in sweep.runs)))
    talk(summary(sweep, outcome))
    return outcome.exit_code


def _pool(arguments: argparse.Namespace, device: str, retry: frozenset[Status], threads: int) -> Any:
    from lorabench.launch.pool import Pool
    from lorabench.launch.worker import Settings
    from lorabench.processes.machine import available_cores, visible_gpus

    gpus, processes = visible_gpus(device), arguments.processes
    if gpus and processes > len(gpus):
        raise InputError(f"--processes {processes}: a GPU each, and only {len(gpus)} can be seen here")
    minutes = arguments.timeout_minutes
    settings = Settings(
        device="cuda" if gpus else "cpu",
        checkpoint_seconds=arguments.checkpoint_seconds,
        timeout_seconds=None if minutes is None else 60 * minutes,
        sharding=arguments.sharding,
        live=arguments.live,
    )
    workers = arguments.workers or len(gpus) // processes or max(1, available_cores() // (threads * processes))
    return Pool(workers=workers, processes=processes, gpus=gpus, settings=settings, retry=retry)
