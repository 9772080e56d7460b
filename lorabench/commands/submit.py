"""Submit what is missing of a sweep to a cluster, and return: the jobs go on by themselves.

Only runs that are neither done nor queued go in; failed ones are left alone unless --retry names them. Many short
runs share a job, and jobs of like runs an array. `lorabench status` tells how they stand. A job that is preempted, or
runs out of time, writes checkpoints, is queued again and goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lorabench.commands._arguments import (
    JSON,
    RESULTS,
    RETRY,
    SET,
    SWEEP,
    argument,
    as_json,
    changes,
    import_for_plan,
    number,
    pack_size,
)  # fmt: skip
from lorabench.config.quote import show_path
from lorabench.terminal.text import talk, tell

ARGUMENTS = [
    SWEEP,
    RESULTS,
    SET,
    argument("--cluster", "a cluster profile (TOML), as in slurm/", required=True, type=Path, metavar="FILE"),
    RETRY,
    argument("--dry-run", "submit nothing: print the plan and the sbatch script", action="store_true"),
    JSON,
    argument("--partition", "instead of the profile's", metavar="P"),
    argument("--account", "instead of the profile's", metavar="A"),
    argument("--qos", "instead of the profile's", metavar="Q"),
    argument("--minutes", "time limit of a job, instead of the profile's", type=number(int, 1), metavar="M"),
    argument("--mem-gib", "memory of a node, instead of the profile's", type=number(float, 0.001), metavar="G"),
    argument("--parallel", "jobs at a time, instead of the profile's", type=number(int, 1), metavar="N"),
    argument("--cells-per-job", "runs that share a job, instead of the profile's", type=number(int, 1), metavar="N"),
    argument(
        "--pack",
        "runs of one base that share their passes, instead of the profile's: N, off or auto",
        type=pack_size,
        metavar="N",
    ),
]
CHANGES = ("partition", "account", "qos", "minutes", "mem_gib", "parallel", "cells_per_job", "pack")


def main(arguments: argparse.Namespace) -> int:
    from lorabench.cluster.enqueue import only_one
    from lorabench.cluster.profile import read_profile
    from lorabench.cluster.submit import Order, prepare, send, try_out
    from lorabench.cluster.submit_text import as_table, as_text
    from lorabench.config.durable import write_bytes
    from lorabench.launch.pool import check_writable, repeatable
    from lorabench.spec.source import as_sweep
    from lorabench.store.store import Store

    changed, retry = changes(arguments.set), repeatable(arguments.retry)
    instead = {key: getattr(arguments, key) for key in CHANGES if getattr(arguments, key) is not None}
    profile = read_profile(arguments.cluster, instead)
    sweep, store = as_sweep(Path(arguments.sweep), changed), Store(arguments.results)
    order = Order(sweep=sweep, profile=profile, cluster=arguments.cluster.stem, retry=retry)
    plan = _plan(order, store)
    if arguments.dry_run:
        prospect = prepare(order, store, plan, talk)
        table = as_table(prospect, store.root)
        tell(as_json(table) if arguments.json else as_text(prospect, table))
        try_out(prospect, store.root, talk)
        return 0
    check_writable(store.root)
    job_ids: list[str | None] = []
    with only_one(store.root, talk) as hold:
        prospect = prepare(order, store, plan)
        if prospect.jobs:
            write_bytes(store.root / sweep.name / "sweep.toml", sweep.text.encode())
            job_ids = send(prospect, store, hold.check).job_ids
    table = as_table(prospect, store.root) | {"job_ids": job_ids}
    tell(as_json(table) if arguments.json else as_text(prospect, table | {"scripts": []}).rstrip())
    if job_ids:
        arrays = dict.fromkeys(str(job_id).partition("_")[0] for job_id in job_ids)
        talk(f"submitted as {', '.join(arrays)}; `lorabench status {show_path(store.root)}` tells how they stand")
    return 0


def _plan(order: Any, store: Any) -> dict[str, Any]:
    import_for_plan()
    from lorabench.cluster.profile import packing
    from lorabench.launch.plan import make_plan

    profile = order.profile
    gpu = f"{profile.gpu_type} {profile.constraint}"
    return make_plan(order.sweep, store, profile.run_device, gpu, packing(profile, order.sweep.alone))
