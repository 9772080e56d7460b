"""How every run of a results folder stands, also while runs go on: as JSON, and as a table or, of many, a summary."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from lorabench.cluster.run_states import Standing
from lorabench.config.decode import InputError
from lorabench.config.quote import show_path
from lorabench.spec.run_spec import brief, flatten, short, swept_keys
from lorabench.spec.sweep import read_sweep
from lorabench.status.logs import last_lines, run_log
from lorabench.status.pace import Usual, all_seconds_left, seconds_left
from lorabench.store.record import FAILURES, Status
from lorabench.store.store import Store
from lorabench.terminal.text import UNITS, count_statuses, doing, duration, text_table

RATES = [f"{unit}/s" for unit in UNITS]
COLUMNS = ["run_id", "status", "step", "loss", "doing", *RATES, "left", "heartbeat", "job", "swept", "reason"]
OPTIONAL = {"loss", "doing", "left", "job"}
"""Columns that are left out where no run has any."""
MANY = 60
"""Of more runs than these there is a summary, and a line only for those that run or have not ended well."""
MAX_SETTINGS = 40
BAD = (*FAILURES, Status.CORRUPT, Status.LOST, Status.INTERRUPTED)
NUM_LINES, MAX_LOGS = 5, 3
"""Of the log of a failed run, and logs in a table's end."""


def status_json(
    store: Store, standings: Sequence[Standing], waiting: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """`{"runs": [{"run_id", "status", "spec", "error", "progress", "measures", "queue", …}], "not_begun"}`."""
    usual = Usual.of(standings)
    return {"runs": [status_row(store, standing, usual) for standing in standings], "not_begun": dict(waiting or {})}


def not_begun(store: Store, standings: Sequence[Standing]) -> dict[str, int]:
    """Sweep -> how many of its runs nobody has begun or submitted, of the sweeps that the results folder keeps."""
    seen = {standing.run_id for standing in standings}
    files = {file.parent.name: file for file in sorted(store.root.glob("*/sweep.toml"))}
    counts = {name: len(_runs_of(file, file.stat().st_mtime_ns) - seen) for name, file in files.items()}
    return {name: count for name, count in counts.items() if count}


@cache
def _runs_of(file: Path, changed: int) -> frozenset[str]:
    """The runs of a kept sweep; none of one that this version cannot read, which `analyze` says."""
    try:
        return frozenset(run.id for run in read_sweep(file, file.parent.name, stored=True).runs)
    except (InputError, OSError):
        return frozenset()


def status_row(store: Store, standing: Standing, usual: Usual) -> dict[str, Any]:
    """All that is known of a run now, as JSON; `last_lines` of its log, or its job's, where it has failed."""
    return _row(standing, usual) | {"last_lines": error_lines(store, standing)}


def _row(standing: Standing, usual: Usual) -> dict[str, Any]:
    state = standing.state
    claim, record = state.claim, state.record
    worker = claim if state.status == Status.RUNNING else None
    return {
        "run_id": state.run_id,
        "status": str(state.status),
        "spec": state.spec,
        "error": None if worker else state.error,
        "progress": claim.progress if claim else {},
        "heartbeat_seconds": max(0.0, time.time() - worker.time) if worker else None,
        "eta_seconds": seconds_left(standing, usual),
        "host": claim.host if claim else None,
        "pid": worker.pid if worker else None,
        "attempts": record.attempts if record else 0,
        "started": record.started if record else None,
        "finished": record.finished if record else None,
        "measures": record.measures if record else {},
        "queue": asdict(standing.queue) if standing.queue else None,
    }


def error_lines(store: Store, standing: Standing) -> list[str]:
    """The last lines that a run which failed, or its job, has printed; none of any other."""
    if standing.status not in (Status.FAILED, Status.OOM, Status.LOST):
        return []
    files = [run_log(store, standing.run_id)]
    if standing.place and standing.queue and standing.queue.job_id:
        of_job = standing.place.submission.job_logs(standing.queue.job_id)
        files = [*of_job, *files] if standing.status == Status.LOST else [*files, *of_job]
    for file in files:
        lines = [line for line in last_lines(file, 4 * NUM_LINES) if line.strip()]
        if lines:
            return lines[-NUM_LINES:]
    return []


def status_text(
    store: Store, standings: Sequence[Standing], many: int = MANY, waiting: Mapping[str, int] | None = None
) -> str:
    """A line a run with the keys in which the runs differ, or a summary of more than `many`; the counts come last.

    `waiting` is what `not_begun` counts.
    """
    flats = [flatten(standing.state.spec) for standing in standings]
    swept = swept_keys(flats)
    shown = list(zip(standings, flats, strict=True))
    blocks = []
    if len(standings) > many:
        blocks.append(_settings_table(standings, flats, swept))
        shown = [(s, flat) for s, flat in shown if s.status in BAD or s.status == Status.RUNNING or _is_unstable(s)]
    usual = Usual.of(standings)
    rows = [_columns(standing, flat, swept, usual) for standing, flat in shown[:many]]
    if rows or len(standings) <= many:
        columns = [c for c in COLUMNS if c not in OPTIONAL or any(row[c] is not None for row in rows)]
        blocks.append(text_table(rows, columns))
    if len(shown) > many:
        blocks.append(f"… and {len(shown) - many} more: --all shows every run")
    blocks += [*_logs(store, [standing for standing, _ in shown]), *_waiting(standings)]
    for name, count in (waiting or {}).items():
        file = show_path(store.root / name / "sweep.toml")
        blocks.append(f"{name}: {count} of its runs not begun; `run` or `submit` with {file} begins them")
    left = all_seconds_left(standings, usual)
    blocks += [] if left is None else [f"about {duration(left)} left, if as many go on to run at a time"]
    return "\n".join([*filter(None, blocks), count_statuses(standing.state for standing in standings)])


def _columns(standing: Standing, flat: dict[str, Any], swept: list[str], usual: Usual) -> dict[str, Any]:
    row, queue, claim = _row(standing, usual), standing.queue, standing.state.claim
    works = claim is not None and claim.is_alive()  # also of a run that is done, and measures how it serves
    loss = row["progress"].get("loss") if works else None
    steps = flat.get("steps", 0) * len(flat.get("tasks", [0]))
    step = steps if row["status"] == Status.DONE else row["progress"].get("step")
    rates = {
        f"{unit}/s": row["measures"].get(f"{unit}_per_second", row["progress"].get(f"{unit}_per_second"))
        for unit in UNITS
    }
    beat, left = row["heartbeat_seconds"], row["eta_seconds"]
    is_here = standing.status in (Status.PENDING, Status.RUNNING, Status.LOST)
    return {
        "run_id": row["run_id"],
        "status": row["status"],
        "step": f"{step or 0}/{steps}" if steps else None,
        "loss": f"{loss:.4g}" if loss is not None else None,
        "doing": doing(row["progress"]) if works else None,
        **{name: f"{rate:.0f}" for name, rate in rates.items() if rate},
        "left": duration(left) if left is not None else None,
        "heartbeat": duration(beat) if beat is not None else None,
        "job": queue.job_id if queue and is_here else None,
        "swept": " ".join(f"{key}={short(flat[key])}" for key in swept if key in flat),
        "reason": reason(standing),
    }


def reason(standing: Standing) -> str | None:
    """Why a run waits; else what its error is, what of it was unstable, or why nothing is known of its job."""
    queue, error, record = standing.queue, standing.state.error, standing.state.record
    if record and _is_unstable(standing):
        return f"unstable: {record.provenance.get('unstable', '')}"
    if queue is None or standing.status == Status.RUNNING:
        return None if standing.status == Status.RUNNING else error
    if standing.status == Status.PENDING:
        return queue.reason or (queue.state or "").lower()
    return error or (queue.reason if queue.state is None else None)


def _is_unstable(standing: Standing) -> bool:
    record = standing.state.record
    return bool(standing.status == Status.DONE and record and record.measures.get("unstable"))


def _settings_table(standings: Sequence[Standing], flats: list[dict[str, Any]], swept: list[str]) -> str:
    """A line a setting with its runs by status. Settings differ in every swept key but those that would be too many."""
    swept = list(dict.fromkeys([*["method.name"] * (len({flat.get("method.name") for flat in flats}) > 1), *swept]))
    texts = [{key: brief(flat[key]) for key in swept if key in flat} for flat in flats]
    sizes = {key: len({text.get(key) for text in texts}) for key in swept}
    keys = [key for key in swept if key != "seed"]
    while len({tuple(text.get(key) for key in keys) for text in texts}) > MAX_SETTINGS:
        others = [key for key in keys if key != "method.name"] or keys  # without it a line tells of nothing
        keys.remove("lr" if "lr" in keys else max(others, key=sizes.__getitem__))
    counts: dict[tuple[str | None, ...], Counter[str]] = {}
    for standing, text in zip(standings, texts, strict=True):
        counts.setdefault(tuple(text.get(key) for key in keys), Counter())[str(standing.status)] += 1
    statuses = [str(status) for status in Status if any(str(status) in counter for counter in counts.values())]
    settings = sorted(counts, key=lambda setting: [_ordinal(text) for text in setting])
    rows = [dict(zip(keys, map(short, setting), strict=True)) | counts[setting] for setting in settings]
    return text_table(rows, [*keys, *statuses]) if keys else ""


def _ordinal(text: str | None) -> tuple[int, float, str]:
    """Sorts numbers by their size, before all else."""
    try:
        return 0, float(text or ""), ""
    except ValueError:
        return 1, 0.0, text or ""


def _logs(store: Store, shown: list[Standing]) -> list[str]:
    """The last lines of the first runs that failed, each under its name."""
    found = {s.run_id: error_lines(store, s) for s in [s for s in shown if s.status in BAD][:MAX_LOGS]}
    return ["\n".join([f"{run_id}:", *(f"    {line}" for line in lines)]) for run_id, lines in found.items() if lines]


def _waiting(standings: Sequence[Standing]) -> list[str]:
    """`waiting: 12 Priority, 3 JobArrayTaskLimit`."""
    waits = Counter(reason(s) or "pending" for s in standings if s.status == Status.PENDING)
    return [f"waiting: {', '.join(f'{number} {reason}' for reason, number in waits.most_common())}"] if waits else []
