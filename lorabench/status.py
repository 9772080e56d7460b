"""How every run of a results folder stands, also while runs go on."""

from __future__ import annotations

import time
from typing import Any

from lorabench.record import RunState, Status, Store
from lorabench.spec import brief, flatten, swept_keys
from lorabench.terminal import count_statuses, duration, text_table

COLUMNS = ["run_id", "status", "step", "tokens/s", "heartbeat", "swept", "error"]


def status_json(store: Store) -> dict[str, Any]:
    """`{"runs": [{"run_id", "status", "spec", "error", "progress", "measures", …}]}`."""
    return {"runs": [_row(state) for state in store.states()]}


def status_text(store: Store) -> str:
    """One line a run with the keys in which the store's runs differ; the counts come last."""
    states = list(store.states())
    flats = [flatten(state.spec) for state in states]
    swept = swept_keys(flats)
    rows = [_columns(_row(state), flat, swept) for state, flat in zip(states, flats, strict=True)]
    return f"{text_table(rows, COLUMNS)}\n{count_statuses(states)}"


def _row(state: RunState) -> dict[str, Any]:
    claim, record = state.claim, state.record
    worker = claim if state.status == Status.RUNNING else None
    return {
        "run_id": state.run_id,
        "status": str(state.status),
        "spec": state.spec,
        "error": None if worker else state.error,
        "progress": claim.progress if claim else {},
        "heartbeat_seconds": max(0.0, time.time() - worker.time) if worker else None,
        "host": claim.host if claim else None,
        "pid": worker.pid if worker else None,
        "attempts": record.attempts if record else 0,
        "started": record.started if record else None,
        "finished": record.finished if record else None,
        "measures": record.measures if record else {},
    }


def _columns(row: dict[str, Any], flat: dict[str, Any], swept: list[str]) -> dict[str, Any]:
    steps = flat.get("steps", 0) * len(flat.get("tasks", [0]))
    step = steps if row["status"] == Status.DONE else row["progress"].get("step")
    rate = row["measures"].get("tokens_per_second", row["progress"].get("tokens_per_second"))
    beat = row["heartbeat_seconds"]
    return {
        "run_id": row["run_id"],
        "status": row["status"],
        "step": f"{step or 0}/{steps}" if steps else None,
        "tokens/s": f"{rate:.0f}" if rate else None,
        "heartbeat": duration(beat) if beat is not None else None,
        "swept": " ".join(f"{key}={brief(flat[key])}" for key in swept if key in flat),
        "error": row["error"],
    }
