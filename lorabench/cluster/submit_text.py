"""What `lorabench submit` says: the plan, how the sweep's runs stand, and the script."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from lorabench.cluster.packing import makespan
from lorabench.cluster.submit import Prospect, scripts, warnings
from lorabench.config.quote import counted
from lorabench.store.record import Status
from lorabench.terminal.text import duration, size


def as_table(prospect: Prospect, root: Path) -> dict[str, Any]:
    """The plan as data."""
    profile, order = prospect.order.profile, prospect.order
    submitted = set(prospect.run_ids)
    left = Counter(str(s.status) for s in prospect.standings.values() if s.run_id not in submitted)
    seconds = [_seconds(prospect, job) for job in prospect.jobs]
    units = profile.nodes * (profile.gpus or profile.cpus * profile.ranks)
    hours = {"at_most": len(seconds) * profile.minutes / 60 * units, "estimated": sum(seconds) / 3600 * units}
    return {
        "submission": prospect.name if prospect.jobs else None,
        "sweep": order.sweep.name,
        "cluster": order.cluster,
        "kind": profile.kind,
        "num_runs": len(order.sweep.runs),
        "num_to_submit": len(submitted),
        "not_submitted": dict(left),
        "arrays": [{"first": first, "num_jobs": count, "num_runs": _runs(prospect, first, count)}
                   for first, count in prospect.arrays],
        "num_jobs": len(prospect.jobs),
        "cells_per_job": [min(map(len, prospect.jobs), default=0), max(map(len, prospect.jobs), default=0)],
        "gpu_hours" if profile.gpus else "core_hours": hours,
        "storage_bytes": sum(prospect.estimates[id].get("updates_bytes", 0.0) for id in submitted),
        "warnings": warnings(prospect, order.sweep.runs),
        "scripts": list(dict.fromkeys(scripts(prospect, root))) if profile.kind == "slurm" else [],
        "jobs": [[cell.run_id for cell in job] for job in prospect.jobs],
    }  # fmt: skip


def _seconds(prospect: Prospect, job: list[Any]) -> float:
    times = [cell.seconds for cell in job]
    return makespan(sum(times), max(times), prospect.order.profile.cells_at_once)


def _runs(prospect: Prospect, first: int, count: int) -> int:
    return sum(len(job) for job in prospect.jobs[first : first + count])


def as_text(prospect: Prospect, table: dict[str, Any]) -> str:
    """The same, to read."""
    stand = [f"{number} {_word(status)}" for status, number in table["not_submitted"].items()]
    stand += [f"{table['num_to_submit']} to submit"] if table["num_to_submit"] else []
    lines = [f"{table['sweep']}: {counted(table['num_runs'], 'run')}: {', '.join(stand)}"]
    if not table["num_jobs"]:
        return "\n".join([*lines, *_hint(prospect)])
    few, many = table["cells_per_job"]
    cells = counted(few, "run") if few == many else f"{few} to {many} runs"
    jobs, arrays = counted(table["num_jobs"], "job"), counted(len(table["arrays"]), "array")
    lines.append(f"{jobs} of {cells} in {arrays}")
    return "\n".join([*lines, *_cost(prospect, table), *_hint(prospect), *table["warnings"], "", *table["scripts"]])


def _cost(prospect: Prospect, table: dict[str, Any]) -> list[str]:
    kind = "GPU" if prospect.order.profile.gpus else "core"
    hours = table[f"{kind.lower()}_hours"]
    return [
        f"{kind}-hours: about {hours['estimated']:.3g}, at most {hours['at_most']:.4g} (the time limit; once)",
        f"storage: about {size(table['storage_bytes'])} of updates",
        f"longest job: about {duration(max(_seconds(prospect, job) for job in prospect.jobs))}",
    ]


def _word(status: str) -> str:
    return "queued" if status == Status.PENDING else status


def _hint(prospect: Prospect) -> list[str]:
    failed = sorted({str(s.status) for s in prospect.standings.values()} & set(map(str, _REPEATABLE)))
    return [f"repeat with --retry {','.join(failed)}"] if failed and not prospect.order.retry else []


_REPEATABLE = (Status.OOM, Status.TIMEOUT, Status.DIVERGED, Status.FAILED, Status.CORRUPT)
